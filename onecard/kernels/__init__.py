"""The speed: the functions of quant/ as torch operators, on the fastest backend that gives the same bits."""
