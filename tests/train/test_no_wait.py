"""Behaviour: from the upload of a micro-batch to the numbers of the update nothing reads a tensor's values, which would
wait for a GPU; so a micro-batch's launches depend on its shapes alone."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import onecard
from onecard.adapter.layers import lora_config
from onecard.config import LoraSettings
from onecard.data.chat.mask import Example
from onecard.data.packing import collate
from onecard.hf.attention import use_packed_attention
from onecard.kernels import attention, elementwise
from onecard.memory.inputs import MemoryStrategy
from onecard.optim.adamw import AdamW
from onecard.train.loss import packed_loss
from onecard.train.recompute import recompute_layers
from onecard.train.step import to_device
from tests.conftest import make_checkpoint

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_"}


class NoWait(TorchDispatchMode):
    """Raises where an operator reads values to decide on the host; `host` are tensors that live there anyway."""

    def __init__(self, host=()):
        super().__init__()
        self.host = {x.data_ptr() for x in host}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        indices = args[1] if name in INDEXING else []
        masks = [x for x in indices if x is not None and x.dtype == torch.bool]
        assert not masks, name  # how many it selects is a shape
        assert name not in READS or args[0].data_ptr() in self.host, name
        return func(*args, **(kwargs or {}))


def test_the_guard_sees_what_would_wait():
    x = torch.ones(2)
    for read in (lambda: x[0].item(), lambda: bool(x[0]), lambda: float(x[0]), lambda: x.nonzero(), lambda: x[x > 0]):
        with pytest.raises(AssertionError), NoWait():
            read()


@pytest.mark.parametrize("num_recomputed", [0, 2])
@pytest.mark.parametrize("state_bits", [32, 8])
def test_a_step_reads_no_values(tmp_path, monkeypatch, state_bits, num_recomputed):
    """By the way that a GPU takes: torch's own attention, and no kernel of the CPU's outside the operators."""
    monkeypatch.setattr(attention, "supports", lambda *tensors: False)
    monkeypatch.setattr(elementwise, "supports", lambda *tensors: False)
    from peft import get_peft_model

    base = onecard.load_model(str(make_checkpoint(tmp_path, hidden_size=256)), compute_dtype="float32", device="cpu")
    model = get_peft_model(base, lora_config(LoraSettings(r=32))).train()
    recompute_layers(base, MemoryStrategy(num_recomputed))
    optimizer = AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, state_bits=state_bits)
    documents = [Example([5, 6, 7, 8, 9], [-100, 6, 7, 8, 9], "a"), Example([5, 9, 8], [-100, 9, 8], "b")]
    for guard in (nullcontext, lambda: NoWait(state["step"] for state in optimizer.state.values())):
        batch = to_device(collate(documents, 16), torch.device("cpu"))
        with use_packed_attention(base), guard():  # after a first step, which makes tables and states
            packed_loss(base, batch, 6).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
        assert norm > 0
    assert any("exp_avg_absmax" in state for state in optimizer.state.values()) == (state_bits == 8)
