"""Folders of compressed-tensors and MLX. Exact: the values that plain readers of the documented layouts compute, and
those of compressed-tensors and mlx-lm, where they are installed. Bound from the maths: the error of each weight.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import onecard
from onecard.config import ExportConfig
from onecard.errors import UserError
from onecard.export.merge.merged import merge
from onecard.export.readers import load_written
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.stored import read_tensor
from tests.conftest import make_checkpoint
from tests.export.merge.test_merged import make_adapter

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
CASES = {
    "w4a16": ("llama", {"group_size": 32}),
    "w4a16 with data": ("llama", {"group_size": 32, "num_rows": 2, "max_seq_length": 64}),
    "fp8": ("qwen3", {}),
    "fp8 experts": ("mixtral", {}),
    "nvfp4": ("llama", {}),
    "mlx": ("qwen2", {}),
}


def nibbles(words):
    return torch.from_numpy((words.numpy().view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15)


def spread(scales, K):
    return scales.float().repeat_interleave(K // scales.shape[1], 1)


def read_w4a16(get):
    codes = nibbles(get("weight_packed")).flatten(1).float()
    assert get("weight_shape").tolist() == list(codes.shape)
    return (codes - 8) * spread(get("weight_scale"), codes.shape[1])


def read_fp8(get):
    return get("weight").float() * get("weight_scale").float()


def read_nvfp4(get):
    packed = get("weight_packed")
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    return E2M1[codes.int()] * spread(get("weight_scale").float() / get("weight_global_scale"), codes.shape[1])


def read_mlx(get):
    codes = nibbles(get("weight")).flatten(1).float()
    return codes * spread(get("scales"), codes.shape[1]) + spread(get("biases"), codes.shape[1])


READERS = {
    "w4a16": (".weight_packed", read_w4a16), "fp8": (".weight_scale", read_fp8),
    "nvfp4": (".weight_packed", read_nvfp4), "mlx": (".scales", read_mlx),
}  # fmt: skip


def read_folder(folder, format):
    """The dequantized matrices of a folder, float32, by name."""
    tensors = load_file(folder / "model.safetensors")
    suffix, reader = READERS[format]
    modules = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {f"{m}.weight": reader(lambda key, m=m: tensors[f"{m}.{key}"]) for m in modules}


@pytest.fixture
def made(request, tmp_path, chats):
    """A case's format, its base, adapter, and exports of both and of the base alone."""
    family, more = CASES[request.param]
    format = request.param.split()[0]
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
    base = make_checkpoint(tmp_path / "base", family, torch.bfloat16, **sizes)
    make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "v_proj"])
    data = {"data": str(chats)} if "data" in request.param else {}
    fields = {"format": format, "model": str(base), "device": "cpu", **more, **data}
    adapter = str(tmp_path / "adapter")
    said = onecard.export(ExportConfig(adapter=adapter, output=str(tmp_path / "tuned"), **fields)).lines
    assert any("--data calibrates" in line for line in said) == (format == "w4a16" and not data)
    onecard.export(ExportConfig(output=str(tmp_path / "untuned"), base="dequantized", **fields))
    return format, merge(str(base), adapter, str(tmp_path / "merged")), tmp_path


@pytest.mark.parametrize("made", CASES, indirect=True)
def test_a_plain_reader_gets_the_merged_weights(made):
    """All matrices of decoder layers are in the file; the others, and what has no adapter, are as they were."""
    format, merged, folder = made
    expected = load_file(merged / "model.safetensors")
    found, without = (read_folder(folder / name, format) for name in ("tuned", "untuned"))
    matrices = {n for n, W in expected.items() if W.dim() == 2 and ".layers." in n and not n.endswith(".gate.weight")}
    assert found.keys() == without.keys() == matrices
    for name, W_hat in found.items():
        W = expected[name].float()
        error = (W - W_hat).norm() / W.norm()
        assert error < {"fp8": 0.03, "nvfp4": 0.11, "w4a16": 0.2}.get(format, 0.12), name
        is_tuned = name.endswith(("q_proj.weight", "v_proj.weight"))
        assert ((W - without[name]).norm() / W.norm() > 1.5 * error) == is_tuned, name
        if format == "fp8":  # half a unit in the last of 4 bits, and a scale's own rounding can clip the largest
            assert ((W - W_hat).abs() <= 2.0**-4 * W.abs() + 2.0**-8 * W.abs().amax(1, keepdim=True)).all()
        if format == "nvfp4":  # levels from 4 to 6 are 2 apart; the scale of a block has 4 bits
            peak = W.view(len(W), -1, 16).abs().amax(-1).repeat_interleave(16, 1)
            assert ((W - W_hat).abs() <= peak / 4 * (1 + 2.0**-4)).all()
    read = inspect_checkpoint(folder / "tuned").tensors
    for name, W in expected.items():
        assert torch.equal(read_tensor(read[name]), found[name].bfloat16() if name in found else W), name


@pytest.mark.parametrize("made", ["w4a16", "fp8", "fp8 experts", "nvfp4"], indirect=True)
def test_compressed_tensors_reads_the_same_weights(made):
    """transformers loads the folder, and the package decompresses it: the product in bfloat16 has one more rounding."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    _, _, folder = made
    model = AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.bfloat16)
    with torch.no_grad():
        model(torch.arange(5, 60)[None])
    found = model.state_dict()
    expected = load_written(folder / "tuned", "cpu").state_dict()
    compared = [name for name in expected if name in found and expected[name].dim() > 1]
    assert sum(".layers." in name for name in compared) >= 10
    for name in compared:
        error = (found[name].float() - expected[name].float()).abs()
        assert (error <= 2.0**-7 * expected[name].float().abs()).all(), name


@pytest.mark.parametrize("made", ["mlx"], indirect=True)
def test_mlx_lm_computes_the_same_logits(made):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    import mlx.core as mx  # type: ignore
    from mlx_lm.utils import load_model  # type: ignore

    _, _, folder = made
    ids = list(range(5, 60))
    model, _ = load_model(folder / "tuned")
    model.set_dtype(mx.float32)
    found = np.array(model(mx.array([ids])))
    expected = load_written(folder / "tuned", "cpu")(torch.tensor([ids])).logits.detach().numpy()
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)  # ours are rounded to bfloat16


@pytest.mark.parametrize("made", ["mlx"], indirect=True)
def test_an_mlx_folder_that_is_damaged_is_refused(made):
    _, _, folder = made
    path, config = folder / "tuned" / "model.safetensors", folder / "tuned" / "config.json"
    whole, said = load_file(path), json.loads(config.read_text())
    assert said["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"} and said["rope_theta"] == 10000.0
    name = "model.layers.0.mlp.up_proj.scales"
    damages = {
        "must have its scales and biases": {key: value for key, value in whole.items() if key != name},
        "must be floats": {**whole, name: whole[name][:, :1].contiguous()},
        "must be finite": {**whole, name: torch.full_like(whole[name], torch.nan)},
    }
    for must, tensors in damages.items():
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(UserError, match=must):
            read_tensor(inspect_checkpoint(folder / "tuned").tensors["model.layers.0.mlp.up_proj.weight"])
    save_file(whole, path, {"format": "pt"})
    for must, changed in (("bits", {"bits": 8}), ("same bits", {"model.layers.0.mlp.up_proj": {"bits": 8}})):
        config.write_text(json.dumps({**said, "quantization": {**said["quantization"], **changed}}))
        with pytest.raises(UserError, match=must):
            inspect_checkpoint(folder / "tuned")


@pytest.mark.parametrize(
    "format, family, must",
    [
        ("mlx", "mixtral", "without experts"),
        ("nvfp4", "mixtral", "without experts"),
        ("mlx", "gemma2", "must be one of llama"),
        ("fp8", "gpt_oss", "tensors of their own"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(format, family, must, tmp_path):
    base = make_checkpoint(tmp_path / "base", family)
    with pytest.raises(UserError, match=must):
        onecard.export(ExportConfig(format=format, model=str(base), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields, must",
    [
        ({"format": "fp8", "data": "rows.jsonl"}, "leave data out"),
        ({"format": "w4a16", "sym": False}, "w4a16 is symmetric"),
        ({"format": "w4a16", "desc_act": True, "data": "rows.jsonl"}, "w4a16 is symmetric"),
        ({"format": "awq"}, "give data"),
    ],
)
def test_settings_that_do_not_fit_together(fields, must):
    with pytest.raises(ValueError, match=must):
        ExportConfig(model="m", output="o", **fields)
