"""Exact: FP8 checkpoints load as the 16-bit checkpoint that transformers dequantizes them to, and what is damaged is
refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GenerationConfig

import onecard
from onecard.adapter.load import with_adapter
from onecard.adapter.origin import Origin, check_origin, origin_of, write_origin
from onecard.errors import UserError
from onecard.export.merge.merged import merge
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.fingerprint import fingerprint
from onecard.hf.stored import read_rows, read_tensor
from tests.conftest import make_checkpoint
from tests.export.merge.test_merged import make_adapter

Q = "model.layers.0.self_attn.q_proj.weight"
BLOCKS = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}


def compressed(strategy, **more):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    fields = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
    return {**fields, "config_groups": groups}


SCHEMES = {  # quantization_config, rows and columns of a block, dtype and shape of the scales
    "blocks": (BLOCKS, (128, 128), torch.float32, None),
    "small blocks": ({**BLOCKS, "weight_block_size": [32, 48]}, (32, 48), torch.float32, None),
    "one scale": ({**BLOCKS, "weight_block_size": None}, (9999, 9999), torch.bfloat16, ()),
    "compressed tensor": (compressed("tensor"), (9999, 9999), torch.bfloat16, (1,)),
    "compressed channel": (compressed("channel"), (1, 9999), torch.bfloat16, None),
    "compressed block": (compressed("block", block_structure=[128, 128]), (128, 128), torch.bfloat16, None),
}


def to_fp8(W, block, dtype, shape):
    """Codes, scales and the 16-bit weight that they mean, by a loop over the blocks."""
    N, K = W.shape
    n, k = min(block[0], N), min(block[1], K)
    scales = torch.empty(-(-N // n), -(-K // k), dtype=dtype)
    codes, meant = torch.empty(N, K, dtype=torch.float8_e4m3fn), torch.empty(N, K, dtype=torch.bfloat16)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * n, i * n + n), slice(j * k, j * k + k))
            scales[i, j] = W[part].float().abs().max() / 448
            codes[part] = (W[part].float() / scales[i, j].float()).to(torch.float8_e4m3fn)
            meant[part] = (codes[part].float() * scales[i, j].float()).bfloat16()
    return codes, scales if shape is None else scales.reshape(shape), meant


def make_fp8(folder, scheme="blocks", family="qwen3", change=None, **settings):
    """An FP8 checkpoint, and beside it the bfloat16 checkpoint that it means."""
    quantization, *how = SCHEMES[scheme]
    model = make_checkpoint(folder / "fp8", family, torch.bfloat16, **settings)
    twin = make_checkpoint(folder / "twin", family, torch.bfloat16, **settings)
    suffix = "_scale_inv" if quantization["quant_method"] == "fp8" else "_scale"
    stored, meant = {}, {}
    for name, W in load_file(model / "model.safetensors").items():
        if "_proj" in name:
            stored[name], stored[name + suffix], meant[name] = to_fp8(W, *how)
            stored[name.replace(".weight", ".input_scale")] = torch.ones(1)
        else:
            stored[name] = meant[name] = W
    if change is not None:
        change(stored)
    write_twins(model, stored, twin, meant, quantization)
    return model, twin


def write_twins(model, stored, twin, meant, quantization):
    """Write a quantized checkpoint's tensors, and those of the plain checkpoint that it means."""
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, twin / "model.safetensors", metadata={"format": "pt"})
    set_quantization(model, quantization)


def check_merged_alike(folder, model, twin, base="original"):
    """The adapter in `folder` is merged into a quantized checkpoint as into its twin; the result is in 16 bits."""
    for name, path in (("ours", model), ("theirs", twin)):
        merge(str(path), str(folder / "adapter"), str(folder / f"{name} {base}"), base)
    ours, theirs = (load_file(folder / f"{name} {base}" / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "quantization_config" not in json.loads((folder / f"ours {base}" / "config.json").read_text())


def set_quantization(model, quantization):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def load(folder, **settings):
    return onecard.load_model(str(folder), device="cpu", **settings)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_those_of_the_16_bit_checkpoint(tmp_path, scheme):
    """192 and 320 are no multiples of 128: the last blocks are smaller."""
    model, twin = make_fp8(tmp_path, scheme, hidden_size=192, intermediate_size=320)
    GenerationConfig(eos_token_id=[3, 5], temperature=0.7, do_sample=True).save_pretrained(model)
    found, wanted = inspect_checkpoint(model), load_file(twin / "model.safetensors")
    assert found.kinds == ["FP8 (E4M3)"] and set(found.tensors) == set(wanted)
    for name, W in wanted.items():
        assert torch.equal(read_tensor(found.tensors[name]), W), name
        assert found.tensors[name].dtype == "BF16" and found.tensors[name].nbytes == W.nbytes
        if W.ndim == 2:
            assert torch.equal(read_rows(found.tensors[name], 31, 99), W[31:130])
    loaded = load(model)
    assert fingerprint(loaded) == fingerprint(load(twin))
    assert loaded.generation_config.eos_token_id == [3, 5]


def test_values_are_those_of_transformers(tmp_path):
    """Sizes are multiples of the block's: transformers derives the block from the number of scales."""
    model, _ = make_fp8(tmp_path, hidden_size=256, intermediate_size=384, head_dim=64)
    how = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=how).state_dict()
    ours = inspect_checkpoint(model).tensors
    assert set(ours) == set(theirs)
    for name, info in ours.items():
        assert torch.equal(read_tensor(info), theirs[name]), name


def test_experts_are_read_one_by_one(tmp_path):
    model, twin = make_fp8(tmp_path, "small blocks", "qwen3_moe")
    assert fingerprint(load(model)) == fingerprint(load(twin))


def test_a_paged_base_is_the_same(tmp_path):
    model, twin = make_fp8(tmp_path)
    paged = load(model, weights_budget=60_000, page_folder=tmp_path)
    assert fingerprint(paged) == fingerprint(load(twin))


def test_an_adapter_is_merged_into_16_bits(tmp_path):
    """The merge and the record of the base equal those of the 16-bit checkpoint, and no file of the base changes."""
    model, twin = make_fp8(tmp_path)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    make_adapter(tmp_path / "adapter", model)
    origin = origin_of(load(model), str(model))
    assert origin.sample == origin_of(load(twin), str(twin)).sample
    write_origin(tmp_path / "adapter", origin)
    with_adapter(load(model), tmp_path / "adapter")
    check_origin(load(model), str(tmp_path / "adapter"))
    for base in ("dequantized", "original"):
        check_merged_alike(tmp_path, model, twin, base)
    assert before == {path.name: path.read_bytes() for path in model.iterdir()}
    other, _ = make_fp8(tmp_path / "other", change=lambda t: t[f"{Q}_scale_inv"].mul_(-2))
    with pytest.raises(UserError, match="the one that the adapter was trained on"):
        merge(str(other), str(tmp_path / "adapter"), str(tmp_path / "wrong"))
    assert isinstance(origin, Origin)


def set_code(name, code):
    def change(tensors):
        tensors[name].view(torch.uint8)[3, 5] = code

    return change


DAMAGES = {
    "no scale": (lambda t: t.pop(f"{Q}_scale_inv"), "must have its scale"),
    "scale of another shape": (lambda t: t.update({f"{Q}_scale_inv": torch.ones(2, 1)}), r"must have shape \[1, 1\]"),
    "scale of integers": (lambda t: t.update({f"{Q}_scale_inv": torch.ones(1, 1).byte()}), "scales must be floats"),
    "scale of a 16-bit weight": (lambda t: t.update({Q: t[Q].bfloat16()}), "a scale must be of an FP8 weight"),
    "scale that is Inf": (lambda t: t[f"{Q}_scale_inv"].fill_(float("inf")), "a scale that is NaN or Inf"),
    "code that is NaN": (set_code(Q, 0x7F), "a code that is NaN"),
    "negative code that is NaN": (set_code(Q, 0xFF), "a code that is NaN"),
    "vector of codes": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn),
                            "model.norm.weight_scale_inv": torch.ones(1)}),
        "must be a matrix",
    ),
    "E5M2": (lambda t: t.update({Q: t[Q].float().to(torch.float8_e5m2)}), "weights must be float tensors|FP8 weight"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_codes_and_scales_are_refused(tmp_path, damage):
    change, expected = DAMAGES[damage]
    model, _ = make_fp8(tmp_path, change=change)
    with pytest.raises(UserError, match=expected) as caught:
        load(model)
    assert "model.safetensors: model" in caught.value.where


@pytest.mark.parametrize(
    "quantization",
    [
        {**BLOCKS, "fmt": "e5m2"},
        {**BLOCKS, "weight_block_size": [128]},
        {**BLOCKS, "weight_block_size": [0, 128]},
        compressed("group", group_size=64),
        compressed("tensor", num_bits=4),
        compressed("block"),
        {"quant_method": "fbgemm_fp8"},
    ],
    ids=str,
)
def test_other_forms_of_fp8_are_refused(tmp_path, quantization):
    model, _ = make_fp8(tmp_path)
    set_quantization(model, quantization)
    with pytest.raises(UserError, match=r"quantization_config|quantized with") as caught:
        load(model)
    assert "config.json" in caught.value.where
