"""Behaviour: on a GPU, groups of heads go to torch's attention only where it needs no scores of all pairs for them."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from onecard.hf.attention import attend, takes_groups
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.skeleton import read_model
from onecard.memory.activations import layer_activations
from tests.conftest import make_checkpoint

CASES = [
    ((7, 5), torch.float16, 64, 64, False),
    ((8, 0), torch.bfloat16, 64, 64, True),
    ((9, 0), torch.float16, 256, 256, True),
    ((9, 0), torch.float32, 64, 64, False),
    ((9, 0), torch.bfloat16, 512, 512, False),
    ((9, 0), torch.bfloat16, 192, 128, False),
]


@pytest.mark.parametrize("capability, dtype, size, value_size, grouped", CASES, ids=str)
def test_heads_are_repeated_where_groups_need_all_scores(capability, dtype, size, value_size, grouped, monkeypatch):
    seen = []

    def attention(q, k, v, *rest, enable_gqa, **settings):
        seen.append((k.shape[1], v.shape[1], enable_gqa))
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        q, k, v = (
            torch.empty(1, heads, 5, D, dtype=dtype, device="cuda")
            for heads, D in ((8, size), (2, size), (2, value_size))
        )
        attend(q, k, v, 1.0, 0.0, None, None, None)
    assert seen == [(2, 2, True) if grouped else (8, 8, False)]


def test_the_plan_counts_repeated_heads(tmp_path, monkeypatch):
    """Two key heads of four: keys and values are kept twice as wide, 2 (a - k) values a token more."""
    model = read_model(inspect_checkpoint(make_checkpoint(tmp_path)))
    text = model.text
    head = text.hidden_size // text.num_attention_heads
    assert text.num_key_value_heads < text.num_attention_heads
    kept = {}
    for dtype in (torch.float32, torch.bfloat16):
        kept[dtype] = layer_activations(model.modules, {}, {}, 8, False, False, dtype, "cuda").kept / dtype.itemsize
    more = 2 * head * (text.num_attention_heads - text.num_key_value_heads)
    assert takes_groups(torch.device("cuda"), torch.bfloat16, head)
    assert kept[torch.float32] - kept[torch.bfloat16] == more
