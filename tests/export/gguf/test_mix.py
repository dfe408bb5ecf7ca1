"""Exact: the types of tensors in llama.cpp's mixes (llama.cpp's src/llama-quant.cpp of 2026)."""

from types import SimpleNamespace
from typing import Any, get_args

import pytest
from gguf import GGMLQuantizationType as Kind

from onecard.config.export import Outtype
from onecard.export.gguf.mix import BASES, Mix

MORE_BITS = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27}  # of 28 layers: an eighth at each end, every third else


def mix_of(outtype, layers=28, group=2, family="qwen3", is_tied=True, has_importance=False, num_experts=0):
    name = "llama" if family in ("llama", "mistral") else family
    config = SimpleNamespace(num_hidden_layers=layers)
    heads = {"num_heads": 16, "num_kv_heads": 16 // group, "num_experts": num_experts}
    arch: Any = SimpleNamespace(config=config, family=family, name=name, **heads)
    return Mix(outtype, arch, is_tied, has_importance)


def kinds(mix, module, K=1024):
    """By layer, the names of a module's types."""
    return [mix.kind(f"blk.{i}.{module}.weight", (64, K)).name for i in range(mix.layers)]


def first(count, one, other, layers=28):
    return [one] * count + [other] * (layers - count)


SOME = ["Q6_K" if i in MORE_BITS else "Q4_K" for i in range(28)]
SOME_5 = ["Q6_K" if i in MORE_BITS else "Q5_K" for i in range(28)]
TABLE = {
    "q4_k_m": ("Q4_K", SOME, SOME, "Q4_K"),
    "q4_k_s": ("Q4_K", first(4, "Q5_K", "Q4_K"), first(3, "Q5_K", "Q4_K"), "Q4_K"),
    "q5_k_m": ("Q5_K", SOME_5, SOME_5, "Q5_K"),
    "q5_k_s": ("Q5_K", ["Q5_K"] * 28, ["Q5_K"] * 28, "Q5_K"),
    "q6_k": ("Q6_K", ["Q6_K"] * 28, ["Q6_K"] * 28, "Q6_K"),
    "q3_k_m": ("Q3_K", first(2, "Q5_K", "Q4_K"), first(1, "Q5_K", "Q4_K"), "Q4_K"),
    "iq4_nl": ("IQ4_NL", ["IQ4_NL"] * 28, first(3, "Q5_K", "IQ4_NL"), "IQ4_NL"),
    "q4_0": ("Q4_0", ["Q4_0"] * 28, ["Q4_0"] * 28, "Q4_0"),
    "q5_1": ("Q5_1", ["Q5_1"] * 28, ["Q5_1"] * 28, "Q5_1"),
    "q8_0": ("Q8_0", ["Q8_0"] * 28, ["Q8_0"] * 28, "Q8_0"),
    "f16": ("F16", ["F16"] * 28, ["F16"] * 28, "F16"),
}  # of a model of 28 layers: most matrices; values; down projections; output projections


@pytest.mark.parametrize("outtype", TABLE)
def test_types_by_module_and_layer(outtype):
    most, value, down, output = TABLE[outtype]
    mix = mix_of(outtype)
    for module in ("attn_q", "attn_k", "ffn_gate", "ffn_up"):
        assert kinds(mix, module) == [most] * 28
    assert kinds(mix, "attn_v") == kinds(mix, "attn_qkv") == value
    assert (kinds(mix, "ffn_down"), kinds(mix, "attn_output")) == (down, [output] * 28)
    head = {"q8_0": "Q8_0", "f16": "F16"}.get(outtype, "Q6_K")
    assert mix.kind("token_embd.weight", (320, 1024)).name == head  # it is the head too
    untied = mix_of(outtype, is_tied=False)
    assert untied.kind("output.weight", (320, 1024)).name == head
    assert untied.kind("token_embd.weight", (320, 1024)).name == most
    assert {mix.kind("blk.0.attn_norm.weight", (1024,)), mix.kind("blk.0.attn_q_norm.weight", (2, 64))} == {Kind.F32}
    assert not list(mix.notes())


@pytest.mark.parametrize(
    ("outtype", "down"),
    [
        ("q4_0", first(3, "Q4_1", "Q4_0")),
        ("q5_0", first(3, "Q5_1", "Q5_0")),
        ("iq4_nl", ["IQ4_NL"] * 28),
        ("q4_k_s", first(3, "Q5_K", "Q4_K")),
        ("q5_1", ["Q5_1"] * 28),
    ],
)
def test_down_projections_with_an_importance_matrix(outtype, down):
    assert kinds(mix_of(outtype, has_importance=True), "ffn_down") == down


@pytest.mark.parametrize(
    ("outtype", "output"),
    [("q4_k_m", "Q5_K"), ("q3_k_m", "Q5_K"), ("iq4_nl", "Q5_K"), ("q5_k_m", "Q5_K"), ("q4_0", "Q4_0")],
)
def test_attention_of_a_model_with_8_experts(outtype, output):
    mix = mix_of(outtype, num_experts=8)
    assert kinds(mix, "attn_v") == kinds(mix, "attn_k") == ["Q8_0"] * 28
    assert set(kinds(mix, "attn_output")) == {output}
    assert kinds(mix, "ffn_down_exps") == kinds(mix_of(outtype), "ffn_down")
    assert kinds(mix_of(outtype, num_experts=9), "attn_v") == kinds(mix_of(outtype), "attn_v")
    assert mix.kind("blk.0.ffn_gate_inp.weight", (8, 1024)) == Kind.F32


def test_every_outtype_has_a_mix():
    assert set(BASES) == set(get_args(Outtype))
    assert len({file_type for _, file_type in BASES.values()}) == len(BASES)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"family": "llama", "layers": 80, "group": 8}, "Q5_K"),
        ({"family": "qwen2", "layers": 80, "group": 1}, "Q5_K"),
        ({"family": "llama", "layers": 80, "group": 1}, "Q4_K"),
        ({"family": "qwen3", "layers": 80, "group": 8}, "Q4_K"),
    ],
    ids=str,
)
def test_values_of_a_70b_model(settings, value):
    assert set(kinds(mix_of("q4_k_m", **settings), "attn_v")) == {"Q6_K", value}


def test_values_that_many_queries_share():
    assert kinds(mix_of("iq4_nl", group=4), "attn_v") == ["Q5_K"] * 28


@pytest.mark.parametrize(
    ("outtype", "wanted", "kind"),
    [("q3_k_m", "Q3_K", "Q4_0"), ("q4_k_s", "Q4_K", "Q5_0"), ("q5_k_s", "Q5_K", "Q5_1"), ("q6_k", "Q6_K", "Q8_0")],
)
def test_rows_that_no_block_fits(outtype, wanted, kind):
    """576 is a multiple of 32 only, 72 of neither."""
    mix = mix_of(outtype)
    assert kinds(mix, "ffn_up", 576) == [kind] * 28
    assert mix.kind("blk.0.ffn_gate.weight", (64, 72)) == Kind.F16
    assert mix.kind("token_embd.weight", (320, 576)) == Kind.Q8_0
    said = list(mix.notes())
    assert said[0].startswith(f"ffn_up of 28 layers: {kind} instead of {wanted}") and "576" in said[0]
    assert said[1].startswith(f"blk.0.ffn_gate.weight: F16 instead of {wanted}")
