"""GGUF files as checkpoints: their metadata as a config and a tokenizer, their blocks as tensors."""
