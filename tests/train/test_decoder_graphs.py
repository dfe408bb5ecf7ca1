"""Exact, on a CPU: a recording is played by running its Python again. What is left to a GPU is torch's own capture."""

from contextlib import nullcontext

import pytest
import torch

from onecard.hf.attention import use_packed_attention
from onecard.train import graphs as module
from onecard.train.graphs import DecoderGraphs, Size, size_of
from onecard.train.loss import decode, to_device
from tests.train.test_memory import make_run

RECORDED = []


class Played:
    """Stands for a recording. Every second one is a backward, which goes back through its forward's last play."""

    def __init__(self, compute, stream, pool):
        self.compute = compute
        self.forward = RECORDED.pop() if RECORDED else None
        if self.forward is None:
            RECORDED.append(self)
            self.result = self.filled = compute()

    @torch.enable_grad()
    def replay(self):
        if self.forward is None:
            self.now = self.compute()
            self.filled.data.copy_(self.now)
            return
        with pytest.MonkeyPatch.context() as patch:
            backward = torch.autograd.backward
            patch.setattr(torch.autograd, "backward", lambda _, grad: backward(self.forward.now, grad))
            self.compute()


@pytest.fixture
def on_cpu(monkeypatch):
    RECORDED.clear()
    monkeypatch.setattr(module, "record_graph", Played)
    monkeypatch.setattr(module, "on_side_stream", nullcontext)
    monkeypatch.setattr(module, "forbid_device_sync", nullcontext)
    monkeypatch.setattr(DecoderGraphs, "has_room", lambda self: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))


def row(ends, seed=0):
    ids = torch.randint(5, 90, (1, ends[-1]), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(b - a) for a, b in zip(ends, ends[1:])])[None]
    return {"input_ids": ids, "position_ids": positions, "cu_seqlens": ends}


def test_a_size_has_the_longest_document_as_a_power_of_two():
    assert size_of(row([0, 300])) == Size(320, 1, 320)
    assert size_of(row([0, 1000, 8000])) == Size(8192, 2, 8192)  # the last one is padded
    assert size_of(row([0, 2000, 4000, 6000, 8000])) == Size(8192, 4, 4096)  # to 2,192 tokens
    assert size_of(row([*range(0, 8000, 100), 8000])) == Size(8192, 128, 512)  # to 292
    assert size_of(row([*range(0, 1024, 8), 1024])) == Size(1024, 128, 128)
    assert size_of(row([0, 3, 40])) == Size(64, 2, 64)


def test_a_graph_reads_the_longest_document_of_its_size(checkpoint, chats, tmp_path, on_cpu, monkeypatch):
    made, *_ = make_run(checkpoint, chats, tmp_path)
    graphs, seen = DecoderGraphs(made.base, made.trainable.values(), 0), []
    monkeypatch.setattr(module, "decode", lambda model, batch: seen.append(batch) or decode(model, batch))
    graphs.attach_gradients()
    with use_packed_attention(made.base):
        for _ in range(2):
            graphs(row([0, 130, 200, 300, 400]))
    captured = [batch for batch in seen if isinstance(batch["cu_seqlens"], torch.Tensor)]
    assert [batch["longest"] for batch in captured] == [256]  # of 416 tokens; this attention refuses it


def test_documents_that_no_graph_takes_leave_graphs_to_whole_rows(checkpoint, chats, tmp_path, on_cpu):
    """As on a GPU before Ampere, whose attention needs the documents' ends on the host."""
    made, *_ = make_run(checkpoint, chats, tmp_path)
    graphs = DecoderGraphs(made.base, made.trainable.values(), 0)
    graphs.attach_gradients()
    with use_packed_attention(made.base):
        for ends in ([0, 20, 60], [0, 20, 60], [0, 60], [0, 60], [0, 20, 90], [0, 20, 90]):
            graphs(row(ends))
    assert list(graphs.graphs) == [Size(64, 1, 64)] and list(graphs.refused) == [True]
    assert graphs.release() and list(graphs.refused) == [False, True] and not graphs.release()


def test_a_replay_gives_the_gradients_of_the_layers(checkpoint, chats, tmp_path, on_cpu):
    made, *_ = make_run(checkpoint, chats, tmp_path, lora_dropout=0.0)
    graphs = DecoderGraphs(made.base, made.trainable.values(), 0)
    with use_packed_attention(made.base):
        for number, ends in enumerate(([0, 64], [0, 64], [0, 50], [0, 60])):
            batch, found = to_device({**row(ends, number), "labels": row(ends)["input_ids"]}, made.device), []
            for make in (graphs, lambda batch: decode(made.base, graphs.pad_to(batch, size_of(batch)))):
                graphs.attach_gradients()
                hidden = make(batch)
                grad = torch.zeros_like(hidden)
                grad[:, : ends[-1]] = torch.randn(
                    1, ends[-1], grad.shape[2], generator=torch.Generator().manual_seed(1)
                )
                hidden.backward(grad)
                found.append([hidden.detach().clone(), *(p.grad.clone() for p in made.trainable.values())])
            assert bool(graphs.graphs) == (number > 0)
            assert all(torch.equal(a, b) for a, b in zip(*found)) and any(g.any() for g in found[0][1:])


def test_the_check_of_a_graph_does_not_overflow_float16(checkpoint, chats, tmp_path, on_cpu):
    made, *_ = make_run(checkpoint, chats, tmp_path, compute_dtype="float16")
    made.base.model.norm.weight.data.fill_(3000)
    graphs = DecoderGraphs(made.base, made.trainable.values(), 0)
    graphs.attach_gradients()
    with use_packed_attention(made.base):
        for _ in range(2):
            hidden = graphs(row([0, 64]))
    assert hidden.abs().max() > 3000 and not graphs.refused and graphs.graphs
