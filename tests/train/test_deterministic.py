"""Behaviour: torch's deterministic mode is on in every part of a run that asks for it, and nowhere else."""

import os
from functools import partial

import pytest
import torch

from onecard.errors import UserError
from onecard.train import deterministic as module
from onecard.train import loop, session
from onecard.train.deterministic import WORKSPACE, deterministic
from tests.forks import Forked
from tests.train.test_loop import adapter_bytes, run


def modes():
    return torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory


def without_a_form():
    """An operation that torch has in no deterministic form on any device."""
    torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))


@pytest.mark.parametrize("wanted", [True, False])
def test_the_mode_is_on_in_the_load_and_in_each_step(checkpoint, chats, tmp_path, monkeypatch, wanted):
    seen, before = [], modes()
    for owner, name in ((session, "load_model"), (loop, "optimizer_step")):

        def noted(whole, *args):
            seen.append((torch.are_deterministic_algorithms_enabled(), *modes()))
            return whole(*args)

        monkeypatch.setattr(owner, name, partial(noted, getattr(owner, name)))
    run(checkpoint, chats, tmp_path / "o", max_steps=2, deterministic=wanted)
    assert seen == 3 * [(True, 2, False) if wanted else (False, *before)] and modes() == before
    if wanted:
        with pytest.raises(UserError, match="deterministic is False, was True"):
            run(checkpoint, chats, tmp_path / "o", resuming=True, max_steps=3)


def test_an_operation_without_a_deterministic_form_is_refused(checkpoint, chats, tmp_path, monkeypatch):
    def step(run):
        without_a_form()
        raise AssertionError("it was computed")

    monkeypatch.setattr(loop, "optimizer_step", step)
    before = modes()
    with pytest.raises(UserError, match="put_ has none in torch") as error:
        run(checkpoint, chats, tmp_path / "o", max_steps=1, deterministic=True)
    assert error.value.where == "deterministic" and modes() == before
    without_a_form()


def test_other_errors_and_other_settings_of_torch_stay():
    torch.set_deterministic_debug_mode("warn")
    try:
        with pytest.raises(RuntimeError, match="mine"), deterministic(True, "cpu"):
            raise RuntimeError("mine")
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize(
    "found, started, said",
    [(None, False, None), (":16:8", True, None), (":0:0", False, ":0:0"), (None, True, "CUDA has started")],
)
def test_cublas_has_its_workspaces_before_cuda_starts(monkeypatch, found, started, said):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setenv(WORKSPACE, "")  # so that it is restored after the test
    monkeypatch.delenv(WORKSPACE)
    if found is not None:
        monkeypatch.setenv(WORKSPACE, found)
    with deterministic(True, "cpu"), deterministic(False, "cuda"):
        assert os.environ.get(WORKSPACE) == found
    if said is not None:
        with pytest.raises(UserError, match=said), deterministic(True, "auto"):
            pass
        return
    with deterministic(True, "auto"):
        assert os.environ[WORKSPACE] == (found or ":4096:8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_two_runs_on_a_gpu_have_the_same_bits(checkpoint, chats, tmp_path):
    """In processes of their own, because CUDA has started in this one."""
    for name in "ab":
        fields = {"device": "cuda", "compute_dtype": "bfloat16", "max_steps": 3, "deterministic": True}
        done = Forked(partial(run, checkpoint, chats, tmp_path / name, **fields)).wait()
        assert done.code == 0, done.err
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
