"""Loss, loop, checkpoints, metrics and report of a run."""
