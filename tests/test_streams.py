"""Behaviour: output in any encoding, a pipe that closes, flags with true and false."""

import os
import subprocess
import sys

import pytest

from onecard.terminal import joined_flags


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_an_encoding_without_our_characters(encoding):
    code = "from onecard.terminal import ready_streams; ready_streams(); print('a … ⁂ b')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.strip() == "a … ⁂ b".encode(encoding, "replace")


def test_a_pipe_that_nobody_reads():
    read, write = os.pipe()
    os.close(read)
    code = "from onecard.terminal import run_app; run_app(lambda *_, **__: [print('x' * 99) for _ in range(9999)])"
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_console_whose_pipe_nobody_reads_is_no_fault_of_the_output(tmp_path):
    """As `onecard train ... | head -1`, whose lines are written inside `as_user_error`."""
    read, write = os.pipe()
    os.close(read)
    code = (
        "from pathlib import Path\nfrom onecard.faults import as_user_error\n"
        "from onecard.terminal import make_console, run_app\n"
        "def run(*_, **__):\n    console = make_console()\n"
        f"    with as_user_error(Path({str(tmp_path)!r}), lambda: ('', '')):\n        console.print('x')\nrun_app(run)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_flags_with_values():
    words = ["train", "--use-dora", "true", "--packing", "False", "--prompt", "true", "--model=a", "true"]
    assert joined_flags(words) == ["train", "--use-dora=true", "--packing=False", "--prompt=true", "--model=a", "true"]


def test_the_parser_takes_them():
    from onecard.cli import app

    def bound(*words):
        return app.parse_args(joined_flags(["train", *words]), exit_on_error=False, print_error=False)[1]

    for words, expected in ((["--use-dora", "true"], True), (["--use-dora", "false"], False), (["--use-dora"], True)):
        assert bound(*words).kwargs["fields"].use_dora is expected
