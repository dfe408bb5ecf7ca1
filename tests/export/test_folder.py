"""Behaviour: an export is whole or not there, whatever ends it. Exact: the base's files are never touched."""

import errno
import hashlib
import os
import signal
import subprocess
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import onecard
from onecard.config import DataConfig, QuantConfig, TrainConfig, make_config
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.export.folder import new_file, new_folder
from onecard.export.merge import merged
from onecard.export.merge.merged import merge
from onecard.export.merge.quantized import quantize_checkpoint, requantize
from onecard.export.verify import merge_verified
from onecard.hf.load import load_tokenizer
from onecard.train.session import run_training
from tests.conftest import make_checkpoint
from tests.export.merge.test_merged import make_adapter
from tests.forks import Forked


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def waits():
    time.sleep(60)


def merge_that(ending, *args):
    """A merge that does `ending` when all but its last files are written."""

    def stop(*_):
        print("writing", flush=True)
        ending()

    merged.write_others = stop
    merge(*args)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    base = make_checkpoint(folder / "base", dtype=torch.bfloat16)
    make_adapter(folder / "adapter", base)
    return str(base), str(folder / "adapter")


def start(ending, *args):
    """A merge in a process of its own, as far as `ending`."""
    child = Forked(merge_that, ending, *args)
    child.until(lambda: child.out == "writing\n")
    return child


def hidden(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_what_a_kill_leaves_is_removed_by_the_next(tuned, tmp_path):
    child = start(killed, *tuned, str(tmp_path / "merged"))
    assert child.wait().code == -signal.SIGKILL
    assert len(hidden(tmp_path)) == 1 and not (tmp_path / "merged").exists()
    merge(*tuned, str(tmp_path / "merged"))
    assert not hidden(tmp_path) and (tmp_path / "merged" / "config.json").is_file()


def test_ctrl_c_leaves_nothing(tuned, tmp_path):
    child = start(waits, *tuned, str(tmp_path / "merged"))
    child.send(signal.SIGINT)
    assert child.wait().code != 0
    assert not list(tmp_path.iterdir())


def test_two_at_once_do_not_destroy_each_other(tuned, tmp_path):
    """The one that is whole first has the name; the other ends with an error, and its files are gone."""
    with pytest.raises(UserError, match="must be new"), new_folder(tmp_path / "merged") as mine:
        (mine / "a").write_text("mine")
        merge(*tuned, str(tmp_path / "merged"))
        whole = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
        assert (mine / "a").read_text() == "mine"
    assert {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()} == whole
    assert not hidden(tmp_path)


def test_a_folder_that_is_there_is_not_written_to(tuned, tmp_path):
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="must be new"):
        merge(*tuned, str(tmp_path / "merged"))
    assert not list((tmp_path / "merged").iterdir())


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_whole_and_its_writer_s_own(links, tmp_path, monkeypatch):
    """As a folder: two at once, a full disk; on a file system without links, too."""
    target = tmp_path / "a.gguf"
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no links")))
    with pytest.raises(UserError, match="No space left"), new_file(target) as mine:
        mine.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="must be new"), new_file(target) as mine:
        mine.write_text("mine")
        with new_file(target) as other:
            other.write_text("other")
        assert mine.read_text() == "mine"
    assert target.read_text() == "other" and [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_a_disk_that_fills_up_midway(tuned, tmp_path, monkeypatch):
    from onecard.hf.writer import TensorFile

    append, written = TensorFile.append, []

    def full(self, name, piece):
        written.append(name)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, name, piece)

    monkeypatch.setattr(TensorFile, "append", full)
    with pytest.raises(UserError, match="No space left"):
        merge(*tuned, str(tmp_path / "merged"))
    assert not list(tmp_path.iterdir())


def test_a_real_disk_that_fills_up(tuned, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        with pytest.raises(UserError, match="must have room"):
            merge(*tuned, str(small / "merged"))
        monkeypatch.setattr(
            "onecard.export.merge.merged.check_room", lambda *args: None
        )  # as if it had been there before
        with pytest.raises(UserError, match="No space left"):
            merge(*tuned, str(small / "merged"))
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)


def test_the_base_is_as_it_was_after_everything(tmp_path, chats):
    """Load, train, merge both ways, verify, requantize, quantize, save_pretrained: same bytes, same times."""
    base = make_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    for path in base.iterdir():
        os.utime(path, (1e9, 1e9))

    def stamp():
        found = {p.name: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in base.iterdir()}
        return found, base.stat().st_mtime_ns

    before, model, out = stamp(), str(base), tmp_path / "out"
    fields = {"model": model, "data": str(chats), "output": str(out), "max_steps": 1, "device": "cpu"}
    run_training(make_config(TrainConfig, {**fields, "sample_prompts": []}), False, Console(quiet=True))
    adapter = str(out / "adapter")
    merge(model, adapter, str(tmp_path / "a"))
    merge(model, adapter, str(tmp_path / "b"), "original")
    dataset = load_dataset(str(chats), load_tokenizer(model), DataConfig()).take([0, 1])
    merge_verified(model, adapter, str(tmp_path / "c"), dataset, ["dequantized", "original"])
    requantize(model, adapter, str(tmp_path / "d"), QuantConfig())
    quantize_checkpoint(model, str(tmp_path / "e"), QuantConfig())
    onecard.load_model(model, device="cpu").save_pretrained(tmp_path / "f")
    assert stamp() == before
    assert (
        load_file(tmp_path / "e" / "model.safetensors").keys() == load_file(tmp_path / "f" / "model.safetensors").keys()
    )
