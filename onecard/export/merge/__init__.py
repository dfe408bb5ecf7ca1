"""Merged checkpoints, in 16 or 4 bits: a base plus an adapter, and their verification."""
