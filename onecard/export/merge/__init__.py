"""Merged checkpoints: 16-bit or 4-bit base plus adapter, and their check."""
