"""Convert a data file to packed rows of tokens and labels. This package needs a tokenizer but no model."""
