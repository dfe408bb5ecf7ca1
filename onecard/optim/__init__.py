"""Learning-rate schedules, and AdamW over the float32 master weights."""
