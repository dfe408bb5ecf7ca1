"""Training files of other tools, as our settings."""
