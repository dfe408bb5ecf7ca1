"""Learning-rate schedules and the optimizer over LoRA's float32 masters."""
