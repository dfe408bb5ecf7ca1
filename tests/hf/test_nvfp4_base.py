"""Exact: the linears of NVFP4 checkpoints, of ModelOpt and of compressed-tensors, stay in NVFP4 and have the values of
the 16-bit checkpoint that they mean. Experts are quantized as those of that checkpoint are."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from onecard.config import QuantConfig
from onecard.errors import UserError
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.fingerprint import fingerprint
from onecard.hf.rounding import lines_of_few_bits
from onecard.hf.skeleton import read_model
from onecard.hf.stored import read_rows, read_tensor
from onecard.kernels import ops
from onecard.nn.experts import weights_of
from onecard.nn.linear import Linear4bit
from tests.conftest import make_checkpoint
from tests.export.merge.test_merged import make_adapter
from tests.hf.test_fp8 import check_merged_alike, load, set_quantization, write_twins

Q = "model.layers.0.self_attn.q_proj"


def packed(**more):
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": groups}


MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
SCHEMES = {"modelopt": MODELOPT, "compressed": packed()}


def e2m1(code):
    """The value of four bits by the format's definition: sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def stored_as(scheme, name, N, K, generator):
    """Random tensors of a weight, and the bfloat16 weight that they mean."""
    codes = torch.randint(0, 16, (N, K), generator=generator)
    scales = (torch.rand(N, K // 16, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
    whole = torch.rand(1, generator=generator) * 1e-4 + 1e-5
    values = torch.tensor([e2m1(code) for code in range(16)])[codes]
    bytes_ = (codes[:, 0::2] + 16 * codes[:, 1::2]).byte()
    if scheme == "modelopt":
        tensors = {".weight": bytes_, ".weight_scale": scales, ".weight_scale_2": whole.reshape(())}
        each = scales.float() * whole
    else:
        whole = 1 / whole
        tensors = {".weight_packed": bytes_, ".weight_scale": scales, ".weight_global_scale": whole}
        each = scales.float() / whole
    tensors |= {".input_scale" if scheme == "modelopt" else ".input_global_scale": torch.ones(1)}
    meant = (values * each.repeat_interleave(16, dim=1)).bfloat16()
    return {name + suffix: tensor for suffix, tensor in tensors.items()}, meant


def make_nvfp4(folder, scheme, change=None, family="qwen3"):
    """An NVFP4 checkpoint, and beside it the bfloat16 checkpoint that it means."""
    model, twin = (make_checkpoint(folder / name, family, torch.bfloat16) for name in ("nvfp4", "twin"))
    generator, stored, meant = torch.Generator().manual_seed(0), {}, {}
    for name, W in load_file(model / "model.safetensors").items():
        if name.endswith("proj.weight"):
            tensors, meant[name] = stored_as(scheme, name.removesuffix(".weight"), *W.shape, generator)
            stored |= tensors
        else:
            stored[name] = meant[name] = W
    if change is not None:
        change(stored)
    write_twins(model, stored, twin, meant, SCHEMES[scheme])
    return model, twin


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_those_of_the_16_bit_checkpoint(tmp_path, scheme):
    model, twin = make_nvfp4(tmp_path, scheme)
    found, wanted = inspect_checkpoint(model), load_file(twin / "model.safetensors")
    assert found.kinds == ["NVFP4"] and set(found.tensors) == set(wanted)
    for name, W in wanted.items():
        assert torch.equal(read_tensor(found.tensors[name]), W), name
        if W.ndim == 2:
            assert torch.equal(read_rows(found.tensors[name], 3, 21), W[3:24]), name
    check_kept(load(model), wanted, "nvfp4", 16)
    lines = lines_of_few_bits(found, read_model(found), QuantConfig())
    assert lines == ["14 of 14 linears stay in NVFP4, as the base stores them: no second rounding"]


def check_kept(model, wanted, quant_type, blocksize):
    """All linears of a loaded model are in this storage, and dequantized they have the bits of 16-bit weights.
    blocksize None: a row."""
    linears = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert linears.keys() == {name for name in wanted if name.endswith("proj.weight")}
    for name, linear in linears.items():
        state, W = linear.loaded_state, wanted[name]
        expected = (quant_type, blocksize or W.shape[1], W.dtype)
        assert (state.quant_type, state.blocksize, state.dtype) == expected
        assert torch.equal(ops.dequantize_4bit(linear.weight, state), W), name


def test_the_settings_change_nothing(tmp_path):
    model, _ = make_nvfp4(tmp_path, "compressed")
    assert fingerprint(load(model)) == fingerprint(load(model, quant_type="fp4", blocksize=128, double_quant=False))


def test_logits_are_those_of_the_16_bit_model(tmp_path):
    """A second rounding moves them; ours and transformers' differ by roundings of products in bfloat16 alone."""
    model, twin = make_nvfp4(tmp_path, "modelopt")
    plain = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.bfloat16).eval()
    ids = torch.randint(5, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        kept, rounded, wanted, exact = (
            m(ids).logits.double()
            for m in (
                load(model, compute_dtype="bfloat16"),
                load(twin, compute_dtype="bfloat16"),
                plain,
                AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval(),
            )
        )
    assert (kept - exact).norm() <= 2 * (wanted - exact).norm() < (rounded - exact).norm() / 2


def test_linears_in_16_bits_and_experts_get_the_settings(tmp_path):
    model, twin = make_nvfp4(tmp_path, "modelopt", lambda stored: as_16_bits(stored, Q), family="qwen3_moe")
    ours, theirs = load(model), load(twin)
    kept = [name for name, m in ours.named_modules() if isinstance(m, Linear4bit) and name != Q]
    found = read_model(inspect_checkpoint(model))
    assert found.kept.keys() == {f"{name}.weight" for name in kept} and len(kept) == 7
    assert ours.get_submodule(Q).loaded_state.quant_type == "nf4"
    one, two = (dict(m.named_modules())["model.layers.0.mlp.experts"] for m in (ours, theirs))
    for weight, other in zip(dict(weights_of(one)).values(), dict(weights_of(two)).values()):
        assert torch.equal(weight.weight, other.weight) and torch.equal(
            *(w.loaded_state.absmax for w in (weight, other))
        )
    line, rounded = lines_of_few_bits(inspect_checkpoint(model), found, QuantConfig())
    assert line.startswith("7 of 8 linears stay in NVFP4") and "weights of the base are stored in NVFP4" in rounded


def as_16_bits(stored, module):
    """Put a plain weight in the place of a packed one."""
    N, K = stored[f"{module}.weight"].shape
    for suffix in (".weight", ".weight_scale", ".weight_scale_2", ".input_scale"):
        del stored[module + suffix]
    stored[f"{module}.weight"] = torch.randn(N, 2 * K, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_an_adapter_is_merged_into_16_bits(tmp_path):
    model, twin = make_nvfp4(tmp_path, "compressed")
    make_adapter(tmp_path / "adapter", model)
    check_merged_alike(tmp_path, model, twin)


DAMAGES = {
    "no scale": (lambda t: t.pop(f"{Q}.weight_scale"), "must have its scales"),
    "no scale of the tensor": (lambda t: t.pop(f"{Q}.weight_scale_2"), "must have its scales"),
    "scales of another shape": (lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:, 1:].clone()}),
                                r"must be F8_E4M3 \[64, 4\]"),
    "scales of bytes": (lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].view(torch.uint8)}),
                        "must be F8_E4M3"),
    "two scales of the tensor": (lambda t: t.update({f"{Q}.weight_scale_2": torch.ones(2)}), "must be one F32"),
    "a scale of NaN": (lambda t: t[f"{Q}.weight_scale"].view(torch.uint8).fill_(0x7F), "NaN or Inf"),
    "a tensor's scale of Inf": (lambda t: t[f"{Q}.weight_scale_2"].fill_(float("inf")), "NaN or Inf"),
    "rows of no whole blocks": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, 1:].clone()}), "blocks of 16"),
    "scales of its inputs": (lambda t: t.update({f"{Q}.pre_quant_scale": torch.ones(64).bfloat16()}),
                             "pre_quant_scale"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_are_refused(tmp_path, damage):
    change, expected = DAMAGES[damage]
    model, _ = make_nvfp4(tmp_path, "modelopt", change)
    with pytest.raises(UserError, match=expected) as caught:
        load(model)
    assert Q in str(caught.value)


@pytest.mark.parametrize(
    "quantization",
    [
        {**MODELOPT, "quant_algo": "NVFP4_AWQ"},
        {**MODELOPT, "quant_algo": "FP8"},
        packed(group_size=32),
        packed(strategy="group"),
    ],
    ids=str,
)
def test_other_layouts_are_refused(tmp_path, quantization):
    model, _ = make_nvfp4(tmp_path, "modelopt" if quantization["quant_method"] == "modelopt" else "compressed")
    set_quantization(model, quantization)
    with pytest.raises(UserError, match="quantization_config"):
        load(model)
