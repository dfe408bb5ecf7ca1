"""Start a command in several processes with torchrun, the launcher of PyTorch."""

from __future__ import annotations

import os
import sys

from onecard.errors import UserError

SECONDS_TO_STOP = 3600  # after a signal: a process finishes its step and writes a checkpoint


def launch(num_processes: int, words: list[str]) -> None:
    """Run `onecard WORDS` in several processes on this machine, and exit with the status of the first one that failed.

    Raises:
        UserError: not even one process.
    """
    if num_processes < 1:
        raise UserError(
            "a run must have a process", str(num_processes), "pass --num-processes 2 or more", "num_processes"
        )
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from onecard.data.workers import num_cores

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process says what its own fault is
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id="onecard",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=SECONDS_TO_STOP,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "onecard", *words)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        sys.exit(status if status > 0 else 128 - status)  # negative: the number of the signal that killed it
    except SignalException as error:
        sys.exit(128 + error.sigval)
