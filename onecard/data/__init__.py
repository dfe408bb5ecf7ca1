"""From a data file to packed rows of tokens and labels; knows nothing of models."""
