"""Ways out: one file a format."""
