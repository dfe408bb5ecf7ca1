"""Exact: files of importance matrices. No worse than plain: sums beside those of transformers' own forward."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from onecard.config import DataConfig, ExportConfig
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.export.gguf.importance import importance_of, read_importance
from onecard.export.gguf.writer import export_gguf
from onecard.hf.load import load_tokenizer

NAME = "blk.0.ffn_down.weight"
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_file(file, sums, counts=(3.0,), kind="imatrix", name=NAME):
    """A file as llama-imatrix writes it (llama.cpp, tools/imatrix/imatrix.cpp, save_imatrix)."""
    writer = gguf.GGUFWriter(None, "imatrix")
    writer.add_type(kind)
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    if sums is not None:
        writer.add_tensor(f"{name}.in_sum2", np.asarray(sums, np.float32))
    if counts is not None:
        writer.add_tensor(f"{name}.counts", np.asarray(counts, np.float32)[:, None])
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


OF_96 = np.full((1, 96), 2.0)
WRONG = {
    # kind: writes a file, what the error says
    "no such importance matrix": (lambda file: None, "no such file"),
    "an older importance matrix": (lambda file: file.write_bytes(b"\x07\0\0\0blk."), "such as a .dat"),
    "a model's file": (lambda file: write_file(file, OF_96, kind="model"), "found: model"),
    "no statistics": (lambda file: write_file(file, None), "must hold statistics"),
    "no number of tokens": (lambda file: write_file(file, OF_96, None), f"{NAME}.counts"),
    "a sum of NaN": (lambda file: write_file(file, OF_96 * np.nan), "finite"),
    "a sum below 0": (lambda file: write_file(file, -OF_96), "below 0"),
    "sums of another number of matrices": (lambda file: write_file(file, OF_96, [1.0] * 7), "each of 7 matrices"),
    "another model's statistics": (lambda file: write_file(file, OF_96[:, :64]), "1 x 96 inputs"),
}


def with_importance(model, output, outtype="q4_0", **settings):
    """The export, and the importance that it used."""
    config = ExportConfig(format="gguf", model=str(model), output=str(output), outtype=outtype, **settings)
    made, used = importance_of(config), []

    def keep(merged, arch):
        used.append(made(merged, arch))
        return used[0]

    written = export_gguf(config.model, None, config.output, config, importance=keep)
    return written, used[0]


def use_wrong(model, folder, kind):
    """What `kind` raises."""
    WRONG[kind][0](folder / "old.imatrix")
    return with_importance(model, folder / "m.gguf", imatrix=str(folder / "old.imatrix"))


@pytest.mark.parametrize("kind", WRONG)
def test_refused(kind, checkpoint, tmp_path):
    with pytest.raises(UserError) as error:
        use_wrong(checkpoint, tmp_path, kind)
    assert WRONG[kind][1] in str(error.value)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"outtype": "bf16"}, "3 to 6 bits"),
        ({"adapter_only": True}, "3 to 6 bits"),
        ({"format": "gptq", "data": "d"}, "imatrix is for gguf"),
    ],
    ids=str,
)
def test_settings_that_contradict_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        ExportConfig(**{"format": "gguf", "model": "m", "output": "o", "imatrix": "i", **settings})


@torch.no_grad()
def test_sums_are_those_of_the_whole_model(tmp_path, checkpoint, chats):
    """Packed rows, one layer at a time, beside each document alone in transformers; both in float32.

    Roundings of float32 through two layers: less than 1e-4 of a sum of positive numbers.
    """
    rows = {"data": str(chats), "max_seq_length": 128}
    written, found = with_importance(checkpoint, tmp_path / "m.gguf", imatrix=str(tmp_path / "new.gguf"), **rows)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = {}

    def see(name, module, args):
        total = args[0].square().sum((0, 1))
        expected[name] = expected.get(name, 0) + total

    layers = enumerate(model.model.layers)
    named = {
        f"blk.{i}.{name}.weight": layer.get_submodule(path) for i, layer in layers for name, path in MODULES.items()
    }
    for name, module in named.items():
        module.register_forward_pre_hook(lambda module, args, name=name: see(name, module, args))
    examples = load_dataset(str(chats), load_tokenizer(str(checkpoint)), DataConfig(max_seq_length=128)).examples
    for example in examples:
        model(torch.tensor([example.input_ids]))
    assert set(found.sums) == set(expected)
    tokens = sum(len(example.input_ids) for example in examples)
    for name, total in expected.items():
        assert found.counts[name].tolist() == [tokens]
        assert ((found.sums[name][0] / total - 1).abs() < 1e-4).all(), name
    assert found.sums["blk.1.ffn_down.weight"].unique().numel() > 90
    assert written.notes[-1] == f"importance of inputs from {tokens:,} tokens of the data"
    read = read_importance(tmp_path / "new.gguf")
    assert {name: t.tolist() for name, t in read.sums.items()} == {name: t.tolist() for name, t in found.sums.items()}
    with pytest.raises(UserError, match="leave --data out"):
        with_importance(checkpoint, tmp_path / "o.gguf", imatrix=str(tmp_path / "new.gguf"), **rows)


def test_errors_of_important_inputs_are_less(tmp_path, checkpoint):
    """llama.cpp's sums over the number of tokens; the file has the importance's types, and names what has none."""
    importance = np.random.default_rng(0).random((1, 96)) ** 4
    write_file(tmp_path / "im.gguf", importance * 5, [5.0], name="blk.1.ffn_down.weight")
    plain = ExportConfig(format="gguf", model=str(checkpoint), output=str(tmp_path / "a.gguf"), outtype="iq4_nl")
    export_gguf(plain.model, None, plain.output, plain)
    written, found = with_importance(checkpoint, tmp_path / "b.gguf", "iq4_nl", imatrix=str(tmp_path / "im.gguf"))
    (read,) = found.of("blk.1.ffn_down.weight", (64, 96))
    assert np.abs(read / importance[0] - 1).max() < 3 * 2**-24  # roundings of the product, the quotient and the cast
    W = AutoModelForCausalLM.from_pretrained(checkpoint).model.layers[1].mlp.down_proj.weight.detach().numpy()
    errors, others = {}, {}
    for name in "ab":
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        down = tensors.pop("blk.1.ffn_down.weight")
        errors[name] = (gguf.dequantize(down.data, down.tensor_type) - W) ** 2
        others[name] = {n: t.data.tobytes() for n, t in tensors.items()}
    assert others["a"] == others["b"]
    assert (errors["b"] * importance).sum() < 0.95 * (errors["a"] * importance).sum()
    assert errors["b"].sum() > errors["a"].sum()
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "b.gguf").fields.items()}
    assert fields["quantize.imatrix.entries_count"] == 1
    assert written.notes[-2] == "importance of inputs from im.gguf"
    assert "blk.0.attn_q.weight, " in written.notes[-1] and written.notes[-1].endswith("and 5 more")
