"""On a GPU. No worse than plain: a training run's losses beside the CPU's in float32."""

import json

import pytest
import torch
from rich.console import Console

from onecard.config import TrainConfig, make_config
from onecard.train.session import run_training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def losses(checkpoint, chats, output, **more):
    fields = {"model": str(checkpoint), "data": str(chats), "output": str(output), "max_steps": 4, **more}
    run_training(make_config(TrainConfig, fields, "test"), False, Console(quiet=True))
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dtype, digits", [("float32", 16), ("bfloat16", 6)])
def test_losses_are_those_of_the_cpu(checkpoint, chats, tmp_path, dtype, digits):
    """A few hundred roundings of the compute dtype (2^-24, 2^-9) on losses of about 6."""
    cpu = losses(checkpoint, chats, tmp_path / "cpu", device="cpu", compute_dtype="float32")
    gpu = losses(checkpoint, chats, tmp_path / "gpu", device="cuda", compute_dtype=dtype)
    assert max(abs(a - b) for a, b in zip(cpu, gpu)) <= 6 * 2.0**-digits
