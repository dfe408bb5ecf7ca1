"""Run chat templates in a separate process, with limits that the operating system enforces.

A checkpoint's template is an untrusted program. jinja2's sandbox blocks files and Python's internals, but not endless
loops or gigabytes of data. Python cannot interrupt one `'a' * 10**10` or `9 ** 9 ** 9` from inside. So templates run
here under three limits: RLIMIT_CPU for each chat, RLIMIT_AS above the memory of the process at its start, and a
maximum length of the output. A system without the first two limits has only the last one.

This file runs as a script, without onecard. Each line of input is JSON that asks for several renderings of a chat, and
each line of output is the JSON reply, until the input ends. `rendering.py` is the client.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:
    resource = None

STATM = Path("/proc/self/statm")


def limit_memory(num_bytes: int) -> None:
    """Limit the process to `num_bytes` more memory than it has now, and write no core file at a stop."""
    if resource is None:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if STATM.exists():
        limit = int(STATM.read_text().split()[0]) * resource.getpagesize() + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def allow_seconds(seconds: int) -> None:
    """Allow that much more CPU time from now on. After that, the kernel ends the process with SIGXCPU."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, hard))


def answers(line: str, render: Any) -> list[dict[str, str]]:
    """Return for each chat {"text"}, {"refused": why} for its messages, or {"stopped": why} for an exceeded limit."""
    request = json.loads(line)
    most = (1 << 20) + 16 * len(line)
    return [answer({**request["all"], **each}, most, render) for each in request["each"]]


def answer(fields: dict[str, Any], most: int, render: Any) -> dict[str, str]:
    try:
        text = render(**fields)[0][0]
    except MemoryError:
        return {"stopped": "it takes too much memory"}
    except OverflowError as error:  # jinja2's own limit on range()
        return {"stopped": str(error)}
    except Exception as error:
        return {"refused": (str(error).splitlines() or [type(error).__name__])[0]}
    return {"text": text} if len(text) <= most else {"stopped": f"it writes {len(text):,} characters"}


def main(seconds: int, num_bytes: int) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    limit_memory(num_bytes)
    for line in sys.stdin:
        allow_seconds(seconds)
        print(json.dumps(answers(line, render_jinja_template)), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
