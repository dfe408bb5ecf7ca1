"""Modules of a quantized model: 4-bit linears, experts in 4 bits, and 16-bit embeddings and heads."""
