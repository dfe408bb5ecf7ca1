"""The process in which chat templates run, with limits that the operating system keeps.

A checkpoint's template is a stranger's program. jinja2's sandbox keeps it from files and from Python's inside, not
from looping for ever or from building gigabytes, and one `'a' * 10**10` or `9 ** 9 ** 9` cannot be interrupted
from within. So it runs here: RLIMIT_CPU for each chat, RLIMIT_AS above what the process takes at its start,
and a bound on what comes out. Systems without these limits (Windows) keep the last one only.

Run as a file, without onecard: a line of JSON in for several renderings of a chat, a line of JSON out, until the
input ends. `rendering.py` is the other end.
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
    """No more than `num_bytes` above what the process has now; no core file when it is stopped."""
    if resource is None:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if STATM.exists():
        limit = int(STATM.read_text().split()[0]) * resource.getpagesize() + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def allow_seconds(seconds: int) -> None:
    """That much more of CPU time from now on; then the kernel ends the process with SIGXCPU."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, hard))


def answers(line: str, render: Any) -> list[dict[str, str]]:
    """For each chat {"text"}, {"refused": why} for these messages, or {"stopped": why} for a template out of bounds."""
    request = json.loads(line)
    most = (1 << 20) + 16 * len(line)
    return [answer({**request["all"], **each}, most, render) for each in request["each"]]


def answer(fields: dict[str, Any], most: int, render: Any) -> dict[str, str]:
    try:
        text = render(**fields)[0][0]
    except MemoryError:
        return {"stopped": "it takes too much memory"}
    except OverflowError as error:  # the sandbox's own bound on range()
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
