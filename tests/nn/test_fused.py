"""Exact: which modules are replaced. No worse than plain: a replaced model beside the one it was."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import onecard
from onecard.nn.fused import FusedGatedMLP, FusedRMSNorm, fuse
from tests.conftest import make_checkpoint


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    "family, norms, mlps", [("llama", 5, 2), ("mistral", 5, 2), ("qwen2", 5, 2), ("qwen3", 9, 2), ("phi3", 5, 0)]
)
def test_families(tmp_path, family, norms, mlps):
    model = onecard.load_model(str(make_checkpoint(tmp_path, family)))
    assert count(model, FusedRMSNorm) == norms
    assert count(model, FusedGatedMLP) == mlps


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_model_computes_the_same(tmp_path, family):
    """Two layers of the same float32 operations in another order: 64 roundings."""
    plain = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path, family)).eval().requires_grad_(False)
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert count(fused, FusedRMSNorm) and count(fused, FusedGatedMLP)
    assert set(fused.state_dict()) == set(plain.state_dict())
    ids = torch.arange(40)[None]
    expected, found = plain(ids).logits, fused(ids).logits
    assert (found - expected).norm() <= 64 * 2**-24 * expected.norm()


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
