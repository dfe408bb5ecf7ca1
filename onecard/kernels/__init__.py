"""The functions of quant/ as torch operators, on the fastest backend with bit-identical results."""
