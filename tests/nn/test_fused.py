"""Exact: which modules are replaced. No worse than plain: a replaced model beside the one it was."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import onecard
from onecard.kernels import rows
from onecard.memory.activations import fused_kinds
from onecard.nn.fused import FusedAttention, FusedGatedMLP, FusedLayer, FusedRMSNorm, fuse
from tests.conftest import make_checkpoint


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


PARTS = (FusedRMSNorm, FusedGatedMLP, FusedAttention, FusedLayer)
KINDS = {  # of two layers
    "llama": (5, 2, 2, 2), "mistral": (5, 2, 2, 2), "qwen2": (5, 2, 2, 2), "qwen3": (9, 2, 2, 2), "phi3": (5, 0, 0, 0),
    "gemma2": (0, 0, 2, 0),
}  # fmt: skip


@pytest.mark.parametrize("family", KINDS)
def test_families(tmp_path, family):
    model = onecard.load_model(str(make_checkpoint(tmp_path, family)))
    assert tuple(count(model, kind) for kind in PARTS) == KINDS[family]
    assert model.config._attn_implementation in ("sdpa", "eager")  # as before


def test_on_a_gpu_only_a_norm_can_be_too_wide():
    pytest.importorskip("triton", reason="Triton is not installed")
    with FakeTensorMode():
        wide, narrow = (torch.empty(size, device="cuda") for size in (28672, 16384))
        assert rows.supports(wide, wide)
        assert rows.supports_norm(narrow, narrow) and not rows.supports_norm(wide, wide)
    for hidden, norm in ((64, True), (28672, False)):
        config = LlamaConfig(hidden_size=hidden, intermediate_size=28672, num_hidden_layers=1, vocab_size=8)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert fused_kinds(model, "cuda") == (norm, True)
        assert fused_kinds(model, "cpu") == (True, True)


@pytest.mark.parametrize("family", KINDS)
def test_the_model_computes_the_same(tmp_path, family):
    """Two layers of the same float32 operations in another order: 64 roundings. With a window shorter than the text
    where the family has one, with two rows, and over a cache."""
    windows = {"mistral": 16, "gemma2": 16}
    settings = {"sliding_window": windows[family]} if family in windows else {}
    folder = make_checkpoint(tmp_path, family, **settings)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert tuple(count(fused, kind) for kind in PARTS) == KINDS[family]
    assert set(fused.state_dict()) == set(plain.state_dict())
    ids = torch.arange(80).view(2, 40)
    expected, found = plain(ids).logits, fused(ids).logits
    assert (found - expected).norm() <= 64 * 2**-24 * expected.norm()
    lengths = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(fused.generate(ids[:1], **lengths), plain.generate(ids[:1], **lengths))
    if family != "gemma2":  # eager by itself, as its caps need
        fused.set_attn_implementation("eager")
        assert (fused(ids).logits - expected).norm() <= 64 * 2**-24 * expected.norm()


def test_another_attention_is_left_alone():
    class Halved(torch.nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.__dict__.update(attention.__dict__)

        def forward(self, x, position_embeddings, attention_mask=None, **kwargs):
            cos, sin = position_embeddings
            return type(self.plain).forward(self.plain, x, (cos / 2, sin), attention_mask, **kwargs)

    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=50,
                                  num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    attention = model.model.layers[0].self_attn
    model.model.layers[0].self_attn = Halved(attention)
    model.model.layers[0].self_attn.__dict__["plain"] = attention
    fuse(model)
    assert not isinstance(model.model.layers[0].self_attn, FusedAttention)


def test_a_layer_with_a_scaled_residual_is_left_alone():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 50,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    for multiplier, number in ((1.0, 1), (0.5, 0)):
        config = AutoConfig.for_model("granite", residual_multiplier=multiplier, **sizes)
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        fuse(model)
        assert count(model, FusedLayer) == number


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_are_the_same(tmp_path, family):
    """Of the layers' input, in float32 to 64 roundings; a second backward of another loss adds to it."""
    plain = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path, family)).requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse(fused)
    found = []
    for model in (plain, fused):
        x = model.get_input_embeddings()(torch.arange(40).view(1, 40)).requires_grad_()
        out = model(inputs_embeds=x, output_hidden_states=True)
        (out.logits.square().mean() + out.hidden_states[1].sin().mean()).backward()
        found.append(x.grad)
    assert (found[1] - found[0]).norm() <= 64 * 2**-24 * found[0].norm()


def test_a_layer_that_is_told_otherwise_is_another_kind():
    """SmolLM3 turns no heads in every fourth layer."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 200, "pad_token_id": 0,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("smollm3", **sizes)).eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert [isinstance(layer.self_attn, FusedAttention) for layer in fused.model.layers] == [True, True, True, False]
    ids = torch.arange(80).view(2, 40)
    assert (fused(ids).logits - plain(ids).logits).norm() <= 64 * 2**-24 * plain(ids).logits.norm()


def test_another_formula_is_left_alone(tmp_path):
    """Gemma's norm multiplies by 1 + weight."""
    model = onecard.load_model(str(make_checkpoint(tmp_path, "gemma2")))
    assert count(model, FusedRMSNorm) == 0


def test_a_lookalike_is_left_alone():
    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, x):
            return FusedRMSNorm(self.weight, self.variance_epsilon)(x) + 0.01

    model = torch.nn.Sequential(Shifted())
    fuse(model)
    assert isinstance(model[0], Shifted)


def test_a_norm_that_learns_gets_its_gradient():
    norm = FusedRMSNorm(torch.nn.Parameter(torch.ones(32)), 1e-6)
    norm(torch.randn(4, 32)).sum().backward()
    assert norm.weight.grad is not None
