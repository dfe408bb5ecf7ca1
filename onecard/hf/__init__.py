"""The parts that work with transformers: checkpoint checks, the quantizer, the load by tensors, packed attention."""
