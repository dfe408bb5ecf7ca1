"""Checkpoints in 4 bits that calibration rows determine: GPTQ and AWQ."""
