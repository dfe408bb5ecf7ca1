"""What torchrun tells a process of a run by environment variables. Without torchrun a process is alone."""

from __future__ import annotations

import os


def is_started() -> bool:
    """Whether torchrun itself has started this process, and not another launcher with the same variables."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def num_processes() -> int:
    """Return the number of the run's processes on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_number() -> int:
    """Return the number of this process among those of the run. One that is alone is 0, whatever RANK says."""
    return int(os.environ.get("RANK", 0)) if num_processes() > 1 else 0


def num_beside() -> int:
    """Return the number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def number_beside() -> int:
    """Return the number of this process among those on this machine, which is that of its GPU."""
    return int(os.environ["LOCAL_RANK"])
