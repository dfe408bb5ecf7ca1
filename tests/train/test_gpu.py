"""On a GPU. No worse than plain: a training run's losses beside the CPU's in float32."""

import json

import pytest
import torch
from rich.console import Console

from onecard.config import TrainConfig, make_config
from onecard.hf.attention import use_packed_attention
from onecard.train.session import run_training
from onecard.train.step import to_device
from tests.train.test_memory import make_run

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


def test_a_micro_batch_of_fixed_shape_is_a_cuda_graph(checkpoint, chats, tmp_path):
    """Captured and replayed on other tokens it gives their gradients: nothing in it waits for the device."""
    made, window, num_tokens = make_run(checkpoint, chats, tmp_path, device="cuda", lora_dropout=0.0)
    first = to_device(window[0], made.device)
    second = {**first, "input_ids": first["input_ids"].flip(1)}  # of the same shapes

    def gradients(batch):
        made.optimizer.zero_grad(set_to_none=True)
        made.loss(made.base, batch, num_tokens).backward()
        return [p.grad.clone() for p in made.trainable.values()]

    with use_packed_attention(made.base):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            expected = gradients(second)
            gradients(first)
        torch.cuda.current_stream().wait_stream(side)
        made.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made.loss(made.base, first, num_tokens).backward()
        first["input_ids"].copy_(second["input_ids"])
        graph.replay()
    for parameter, gradient in zip(made.trainable.values(), expected):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
