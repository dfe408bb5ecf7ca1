"""Quantization in plain torch, written for readability: the specification that every kernel must match."""
