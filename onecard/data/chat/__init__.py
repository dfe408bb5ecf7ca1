"""Render chat templates in a sandbox, and find the supervised tokens."""
