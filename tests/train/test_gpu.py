"""On a GPU. No worse than plain: a training run's losses beside the CPU's in float32."""

import json

import pytest
import torch
from rich.console import Console

from onecard.config import TrainConfig, make_config
from onecard.hf.attention import packed_attention, use_packed_attention
from onecard.train.graphs import size_of
from onecard.train.run import make_graphs
from onecard.train.session import run_training
from onecard.train.step import micro_batch, to_device
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
        made.drop_gradients()
        made.loss(made.base, batch, num_tokens).backward()
        return [p.grad.clone() for p in made.trainable.values()]

    with use_packed_attention(made.base):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            expected = gradients(second)
            gradients(first)
        torch.cuda.current_stream().wait_stream(side)
        made.drop_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made.loss(made.base, first, num_tokens).backward()
        first["input_ids"].copy_(second["input_ids"])
        graph.replay()
    for parameter, gradient in zip(made.trainable.values(), expected):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_graphs_give_what_the_layers_give(checkpoint, chats, tmp_path, dropout):
    """Rows of one and of many documents, recorded at their second coming: the same losses and gradients to rounding."""
    fields = {"device": "cuda", "lora_dropout": dropout, "compute_dtype": "bfloat16", "gradient_accumulation_steps": 3}
    made, window, num_tokens = make_run(checkpoint, chats, tmp_path, **fields)
    graphs = make_graphs(made, 1 << 40)
    found = []
    with use_packed_attention(made.base):
        for made.graphs in (None, graphs, graphs, graphs):
            torch.cuda.manual_seed(0)
            made.drop_gradients()
            if made.graphs is not None:
                graphs.attach_gradients()
            losses = torch.stack([micro_batch(made, batch, num_tokens) for batch in window])
            found.append([losses, *(p.grad.clone() for p in made.trainable.values())])
    assert not graphs.refused and len(graphs.graphs) == len({size_of(batch) for batch in window})
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert (a - b).norm() <= 2**-6 * a.norm()


def test_a_run_with_graphs_has_the_losses_of_one_without(checkpoint, chats, tmp_path):
    fields = {"device": "cuda", "compute_dtype": "bfloat16", "num_train_epochs": 3, "max_steps": None}
    plain = losses(checkpoint, chats, tmp_path / "plain", cuda_graphs=False, **fields)
    graphed = losses(checkpoint, chats, tmp_path / "graphed", **fields)
    assert len(plain) == len(graphed) and max(abs(a - b) for a, b in zip(plain, graphed)) <= 6 * 2.0**-6


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_documents_at_once_are_documents_one_by_one(window, kv_heads):
    """In bfloat16, no worse than twice torch's attention on each document, against float32."""
    T, ends = 96, [0, 5, 40, 40, 96]
    x = [
        torch.randn(1, heads, T, 32, generator=torch.Generator().manual_seed(heads))
        for heads in (4, kv_heads, kv_heads)
    ]
    g = torch.randn(1, T, 4, 32, generator=torch.Generator().manual_seed(9))

    def computed(dtype, device, cu_seqlens):
        q, k, v = (t.to(device, dtype).requires_grad_() for t in x)
        y, _ = packed_attention(torch.nn.Module(), q, k, v, None, cu_seqlens=cu_seqlens, sliding_window=window)
        y.backward(g.to(device, dtype))
        return [t.float().cpu() for t in (y, q.grad, k.grad, v.grad)]

    exact = computed(torch.float32, "cuda", ends)
    on_device = torch.tensor(ends, dtype=torch.int32, device="cuda")
    one_by_one = computed(torch.bfloat16, "cpu", ends)
    for found in (computed(torch.bfloat16, "cuda", ends), computed(torch.bfloat16, "cuda", on_device)):
        for a, b, c in zip(found, one_by_one, exact):
            assert (a - c).norm() <= 2 * (b - c).norm() + 2**-9 * c.norm()
