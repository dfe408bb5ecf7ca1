"""Exact: GPTQ, AWQ and compressed-tensors checkpoints in 4 bits have the values of the 16-bit checkpoint they mean.
Linears with groups in order stay as they are stored; the others load as those of that checkpoint."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from onecard.config import QuantConfig
from onecard.errors import UserError
from onecard.export.calibrated.awq import AWQ as AWQ_STORAGE
from onecard.export.calibrated.gptq import GPTQ as GPTQ_STORAGE
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.fingerprint import fingerprint
from onecard.hf.rounding import lines_of_few_bits
from onecard.hf.skeleton import read_model
from onecard.hf.stored import read_rows, read_tensor
from onecard.kernels import ops
from onecard.nn.linear import Linear4bit
from onecard.quant.grouped import Grouped, pack_int32
from tests.conftest import make_checkpoint
from tests.export.merge.test_merged import make_adapter
from tests.hf.test_fp8 import check_merged_alike, load, set_quantization, write_twins
from tests.hf.test_nvfp4_base import check_kept

Q = "model.layers.0.self_attn.q_proj"
GROUP = 32
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def packed(strategy="group", group_size=GROUP, **more):
    weights = {"num_bits": 4, "type": "int", "strategy": strategy, "group_size": group_size, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


SCHEMES = {
    "gptq": GPTQ,
    "gptq in order": {**GPTQ, "desc_act": False},
    "gptq symmetric": {**GPTQ, "sym": True, "desc_act": False},
    "gptq symmetric version 2": {**GPTQ, "sym": True, "desc_act": False, "checkpoint_format": "gptq_v2"},
    "gptq version 2": {**GPTQ, "checkpoint_format": "gptq_v2"},
    "awq": AWQ,
    "compressed": packed(symmetric=True),
    "compressed with zeros": packed(symmetric=False),
    "compressed rows": packed("channel", None),
}
KEPT = {  # quant_type and blocksize
    **dict.fromkeys(("gptq symmetric", "gptq symmetric version 2", "compressed"), ("uint4", GROUP)),
    **dict.fromkeys(("gptq in order", "awq"), ("uint4_zeros", GROUP)),
    "compressed rows": ("uint4", None),
}
OBSTACLES = dict.fromkeys(("gptq", "gptq version 2", "compressed with zeros"), "desc_act")


def random_grouped(N, K, size, generator):
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)  # noqa: E731
    scales = (torch.rand(N, K // size, generator=generator) * 0.05 + 0.001).half()
    group = (torch.arange(K, dtype=torch.int32) // size)[torch.randperm(K, generator=generator)]
    return Grouped(draw(0, 16, N, K), scales, draw(1, 16, N, K // size), group)


def stored_as(scheme, weight):
    """The tensors of a weight in a scheme, by suffix, and the weight as it then is."""
    plain = Grouped(weight.codes_NK, weight.scales_NG, weight.zeros_NG, weight.group_K.sort().values)
    if scheme == "awq":
        return {f".{key}": t for key, t in AWQ_STORAGE().tensors(plain).items()}, plain
    weight = plain if scheme == "gptq in order" else weight
    if scheme.startswith("gptq symmetric"):
        weight = Grouped(plain.codes_NK, plain.scales_NG, torch.full_like(plain.zeros_NG, 8), plain.group_K)
    if scheme.startswith("gptq"):
        found = {f".{key}": t for key, t in GPTQ_STORAGE().tensors(weight).items()}
        if scheme.endswith("version 2"):
            N = len(weight.zeros_NG)
            found[".qzeros"] = pack_int32(weight.zeros_NG.T.contiguous().view(-1, N // 8, 8))
        return found, weight
    N, K = weight.codes_NK.shape
    found = {
        ".weight_packed": pack_int32(weight.codes_NK.view(N, K // 8, 8)),
        ".weight_scale": weight.scales_NG,
        ".weight_shape": torch.tensor([N, K]),
    }
    if scheme != "compressed with zeros":
        return found, Grouped(plain.codes_NK, plain.scales_NG, torch.full_like(plain.zeros_NG, 8), plain.group_K)
    found[".weight_zero_point"] = pack_int32(weight.zeros_NG.T.contiguous().view(-1, N // 8, 8)).T
    found[".weight_g_idx"] = weight.group_K
    return found, weight


def make_int4(folder, scheme, change=None):
    """A checkpoint of 4-bit integers, and beside it the float16 checkpoint that it means."""
    model, twin = (
        make_checkpoint(folder / name, "qwen2", torch.float16, intermediate_size=128) for name in ("int4", "twin")
    )
    generator, stored, meant = torch.Generator().manual_seed(0), {}, {}
    for name, W in load_file(model / "model.safetensors").items():
        if name.endswith("proj.weight"):
            size = W.shape[1] if scheme == "compressed rows" else GROUP
            tensors, weight = stored_as(scheme, random_grouped(*W.shape, size, generator))
            stored |= {name.removesuffix(".weight") + key: tensor.contiguous() for key, tensor in tensors.items()}
            meant[name] = weight.dequantize().half()
        else:
            stored[name] = meant[name] = W
    if change is not None:
        change(stored)
    write_twins(model, stored, twin, meant, SCHEMES[scheme])
    return model, twin


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_those_of_the_16_bit_checkpoint(tmp_path, scheme):
    model, twin = make_int4(tmp_path, scheme)
    found, wanted = inspect_checkpoint(model), load_file(twin / "model.safetensors")
    assert set(found.tensors) == set(wanted) and "(4 bits)" in found.kinds[0]
    for name, W in wanted.items():
        assert torch.equal(read_tensor(found.tensors[name]), W), name
        if W.ndim == 2:
            assert torch.equal(read_rows(found.tensors[name], 3, 21), W[3:24]), name
            assert torch.equal(read_rows(found.tensors[name], 8, 16), W[8:24]), name
    (line,) = lines_of_few_bits(found, read_model(found), QuantConfig())
    if scheme in KEPT:
        check_kept(load(model), wanted, *KEPT[scheme])
        assert line == f"14 of 14 linears stay in {found.kinds[0]}, as the base stores them: no second rounding"
    else:
        assert fingerprint(load(model)) == fingerprint(load(twin))
        assert found.kinds[0] in line and "a second time" in line and OBSTACLES[scheme] in line


@pytest.mark.parametrize(
    "change, obstacle",
    [
        ({".scales": lambda t: t.float()}, "scales in F32"),
        ({".g_idx": lambda t: t.flip(0)}, "desc_act"),
    ],
    ids=["scales", "groups"],
)
def test_one_linear_that_cannot_stay_is_converted(tmp_path, change, obstacle):
    def edit(stored):
        stored.update({f"{Q}{key}": by(stored[f"{Q}{key}"]).contiguous() for key, by in change.items()})

    model, _ = make_int4(tmp_path, "gptq symmetric", edit)
    checkpoint, loaded = inspect_checkpoint(model), load(model, compute_dtype="float32")
    kept, rounded = lines_of_few_bits(checkpoint, read_model(checkpoint), QuantConfig())
    assert kept.startswith("13 of 14 linears stay") and rounded.startswith("1 weights") and obstacle in rounded
    types = {name: m.loaded_state.quant_type for name, m in loaded.named_modules() if isinstance(m, Linear4bit)}
    assert {name for name, quant_type in types.items() if quant_type == "nf4"} == {Q}
    expected, _ = ops.quantize_4bit(read_tensor(checkpoint.tensors[f"{Q}.weight"]))
    assert torch.equal(loaded.get_submodule(Q).weight, expected)


def test_a_group_that_no_block_has_is_converted(tmp_path):
    """Of 48: no power of two."""
    model = make_checkpoint(tmp_path / "m", "qwen2", torch.float16, hidden_size=96, intermediate_size=192)
    stored, generator = {}, torch.Generator().manual_seed(0)
    for name, W in load_file(model / "model.safetensors").items():
        if name.endswith("proj.weight") and W.shape[1] % 48 == 0:
            tensors, _ = stored_as("compressed", random_grouped(*W.shape, 48, generator))
            stored |= {name.removesuffix(".weight") + key: tensor.contiguous() for key, tensor in tensors.items()}
        else:
            stored[name] = W
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    set_quantization(model, packed(group_size=48))
    (line,) = lines_of_few_bits(checkpoint := inspect_checkpoint(model), read_model(checkpoint), QuantConfig())
    assert "groups of 48 inputs of 96" in line


def test_an_adapter_is_merged_into_16_bits(tmp_path):
    model, twin = make_int4(tmp_path, "gptq symmetric")
    make_adapter(tmp_path / "adapter", model)
    check_merged_alike(tmp_path, model, twin)


DAMAGES = {
    "no zeros": (lambda t: t.pop(f"{Q}.qzeros"), "scales and zeros"),
    "no scales": (lambda t: t.pop(f"{Q}.scales"), "scales and zeros"),
    "groups of another number": (lambda t: t.update({f"{Q}.scales": torch.ones(3, 64).half()}), "must fit it"),
    "zeros of another dtype": (lambda t: t.update({f"{Q}.qzeros": t[f"{Q}.qzeros"].float()}), "must fit it"),
    "codes of bytes": (lambda t: t.update({f"{Q}.qweight": t[f"{Q}.qweight"].byte()}), "a matrix of I32"),
    "a group out of range": (lambda t: t[f"{Q}.g_idx"].fill_(2), "a group of 2 of 2"),
    "a scale of Inf": (lambda t: t[f"{Q}.scales"].fill_(float("inf")), "NaN or Inf"),
    "a zero of 16": (lambda t: t[f"{Q}.qzeros"].fill_(-1), "a zero of 0 or 16"),
    "a weight twice": (lambda t: t.update({f"{Q}.weight": torch.ones(64, 64).half()}), "stored once"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_are_refused(tmp_path, damage):
    change, expected = DAMAGES[damage]
    model, _ = make_int4(tmp_path, "gptq", change)
    with pytest.raises(UserError, match=expected) as caught:
        load(model)
    assert Q in str(caught.value)


@pytest.mark.parametrize(
    "quantization",
    [
        {**GPTQ, "bits": 8},
        {**GPTQ, "checkpoint_format": "marlin"},
        {**GPTQ, "dynamic": {".*down.*": {"bits": 8}}},
        {**AWQ, "version": "gemv"},
        {**AWQ, "zero_point": False},
        packed(num_bits=8),
        packed("tensor"),
        packed("group", None),
    ],
    ids=str,
)
def test_other_layouts_are_refused(tmp_path, quantization):
    model, _ = make_int4(tmp_path, "gptq")
    set_quantization(model, quantization)
    with pytest.raises(UserError, match="quantization_config"):
        load(model)
