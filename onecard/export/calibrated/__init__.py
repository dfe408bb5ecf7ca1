"""Checkpoints in 4 bits that calibration rows have chosen: GPTQ and AWQ."""
