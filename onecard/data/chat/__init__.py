"""Chat templates: rendering in a sandbox, and the mask of learned tokens."""
