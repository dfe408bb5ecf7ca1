"""Behaviour: whatever call of the system fails while a command writes, it ends in success or a UserError, and nothing
that was committed before is lost. faults/shim.c is preloaded and makes the calls fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from onecard.errors import UserError
from onecard.faults import about, as_user_error

HERE = Path(__file__).parent


@pytest.mark.parametrize("each", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_call_that_fails_is_told_and_loses_nothing(each, tmp_path):
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    shim = tmp_path / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "faults" / "shim.c", "-ldl"], check=True)
    command = [sys.executable, "-m", "tests.faults.driver", str(tmp_path / "work"), str(each)]
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    done = subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=600 if each > 1 else 7200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found["counts"])
    assert not found["wrong"], f"{len(found['wrong'])} of {found['counts']}\n" + "\n\n".join(found["wrong"][:5])
    assert sum(number for kind, number in found["counts"].items() if kind.endswith(" error")) > 30


def test_a_connection_s_error_and_a_bug_s_stay_what_they_are(tmp_path):
    """A pipe that is closed, a library's own kind of OSError, and anything else pass as they are."""

    class Remote(OSError):
        pass

    for error in (BrokenPipeError(32, "closed"), Remote("no route"), ValueError("x")):
        with pytest.raises(type(error)) as found, as_user_error(tmp_path, lambda: ("", "")):
            raise error
        assert found.value is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to open file </x/a.safetensors> in read-only mode: Disk quota exceeded (122)"),
        RuntimeError("unable to mmap 1024 bytes from file </x/a.safetensors>: Disk quota exceeded (122)"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_a_fault_in_another_library_s_words_is_one(error, tmp_path):
    """torch opens a file that safetensors reads, and says so in a RuntimeError."""
    kept = as_user_error(tmp_path, lambda: ("nothing is kept", "start again"))
    with pytest.raises(UserError, match="Disk quota exceeded; nothing is kept") as found, kept, about(tmp_path / "a"):
        raise error
    assert found.value.where == str(tmp_path / "a") and found.value.do.startswith("make room")


def test_another_error_of_torch_is_no_fault(tmp_path):
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied (2)")
    with pytest.raises(RuntimeError) as found, as_user_error(tmp_path, lambda: ("", "")), about(tmp_path):
        raise error
    assert found.value is error


def test_a_fault_names_its_file_and_whether_it_was_written(tmp_path):
    target = tmp_path / "out"
    for path, must in (
        (target / "a", "the result's files"),
        (tmp_path / ".out.0123abcd.tmp" / "a", "the result's files"),
        (tmp_path / "output" / "a", "that is needed must be read"),
    ):
        kept = as_user_error(target, lambda: ("some is kept", "go on"))
        with pytest.raises(UserError, match=must) as found, kept, about(path):
            raise OSError(5, "Input/output error")
        assert found.value.where == str(path) and "some is kept" in found.value.found
