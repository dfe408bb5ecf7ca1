"""Apply a function to many items, in their order, in several processes.

The processes are forks of this one, so the function and what it holds are not copied through a pipe. Where the system
has no safe fork or this process may have no children, and for few items, this process does the work.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from onecard.errors import UserError

FEW = 512  # items that are done before processes start
CHUNK = 64  # items that go through a pipe together
MOST_PROCESSES = 16

Item = TypeVar("Item")
Done = TypeVar("Done")
work: Callable[[Any], Any] | None = None  # the function, in a forked process


def in_processes(
    function: Callable[[Item], Done], items: Iterable[Item], renew: Callable[[], None], num_processes: int | None = None
) -> Iterator[Done]:
    """Yield function(item) for each item, in order. A few chunks are in work at a time, whatever the number of items.

    Args:
        renew: called in each new process; it must replace what processes cannot share.
        num_processes: default: one for each core that this process may use, at most MOST_PROCESSES.

    Raises:
        UserError: a process was ended from outside, such as for memory.
    """
    items = iter(items)
    yield from map(function, islice(items, FEW))
    processes = num_processes or min(num_cores(), MOST_PROCESSES)
    chunks = iter(lambda: list(islice(items, CHUNK)), [])
    first = next(chunks, None)
    if first is None:
        return
    if processes < 2 or sys.platform != "linux" or multiprocessing.current_process().daemon:
        yield from map(function, first)
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, begin, (function, renew))
    try:
        waiting: deque[Future[list[Done]]] = deque([pool.submit(do_chunk, first)])
        for chunk in chunks:
            waiting.append(pool.submit(do_chunk, chunk))
            if len(waiting) > 2 * processes:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        must, do = "the processes that tokenize must run to their end", "free memory, then start again"
        raise UserError(must, str(error), do) from None
    finally:
        pool.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin(function: Callable[[Any], Any], renew: Callable[[], None]) -> None:
    """Begin a forked process. It ends with its parent, also if that is killed; Ctrl-C ends the parent only."""
    global work
    work = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in a fork, and it says so once a process
    renew()


def do_chunk(items: list[Any]) -> list[Any]:
    assert work is not None
    return [work(item) for item in items]
