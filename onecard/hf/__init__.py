"""transformers' side: checkpoint checks, the quantizer, streaming load, packed attention."""
