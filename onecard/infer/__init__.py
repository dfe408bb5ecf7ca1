"""Inference: generate, chat and serve."""
