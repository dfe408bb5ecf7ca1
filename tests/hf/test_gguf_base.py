"""Exact: a GGUF file as a base has the values of transformers' own load, the config and the tokens of the checkpoint
that it was made from. What is damaged, or not known to be right, is refused."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import onecard
from onecard.adapter.origin import origin_of, read_origin
from onecard.config import GgufConfig, TrainConfig
from onecard.errors import UserError
from onecard.export.gguf.vocabulary import PROBE
from onecard.export.gguf.writer import export_gguf
from onecard.export.merge.merged import merge
from onecard.hf.checkpoint import inspect_checkpoint
from onecard.hf.fingerprint import fingerprint
from onecard.hf.gguf.header import read_header
from onecard.hf.gguf.tensors import Blocks
from onecard.hf.load import find_checkpoint, load_tokenizer
from onecard.hf.skeleton import read_config, read_model
from onecard.hf.stored import read_rows, read_tensor
from onecard.terminal import make_console
from onecard.train.prepare import prepare
from onecard.train.session import run_training
from tests.conftest import TEXT, chat_rows, make_checkpoint, make_tokenizer, write_rows
from tests.export.gguf.test_gguf import CASES, LLAMA3_ROPE, TEXTS, more_families, sentencepiece_like

__all__ = ["more_families"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MORE = {
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}),
    "llama3 as published": ("llama", {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}}),
    "heads of another size": ("qwen3", {"head_dim": 32}),
    "caps": ("gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 16, "attn_logit_softcapping": None}),
    "gemma": ("gemma", {"num_key_value_heads": 1}),
}
IGNORED = {"_name_or_path", "transformers_version", "initializer_range", "architectures", "dtype", "use_cache"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_gguf(folder, family="llama", outtype="q8_0", tokenizer=None, **settings):
    """A checkpoint and a GGUF file of it."""
    model = make_checkpoint(folder / "model", family, torch.bfloat16, **settings)
    if tokenizer is not None:
        tokenizer.save_pretrained(model)
    return model, export_gguf(str(model), None, str(folder / "m.gguf"), GgufConfig(outtype=outtype), "original").file


def load(model, **settings):
    return onecard.load_model(str(model), device="cpu", **settings)


@pytest.mark.parametrize("case", [*CASES, *MORE])
def test_config_and_values_are_those_of_the_checkpoint(tmp_path, case):
    """bfloat16 in the file, so nothing is rounded: every tensor and every field of the config comes back."""
    family, settings = {**CASES, **MORE}[case]
    model, file = make_gguf(tmp_path, family, "bf16", **settings)
    found = inspect_checkpoint(find_checkpoint(str(file)))
    wanted = load_file(model / "model.safetensors")
    assert set(found.tensors) == set(wanted) - ({"lm_head.weight"} if settings.get("tie_word_embeddings") else set())
    for name, info in found.tensors.items():
        assert torch.equal(read_tensor(info), wanted[name]), name
    ours, theirs = read_config(found.folder).to_dict(), AutoConfig.from_pretrained(model).to_dict()
    ours["model_type"] = theirs["model_type"] if family == "mistral" else ours["model_type"]
    for name in theirs.keys() - IGNORED - {"rope_parameters", "sliding_window" if family == "mistral" else ""}:
        assert ours.get(name) == theirs[name], name
    assert {k: v for k, v in ours["rope_parameters"].items() if v is not None} == theirs["rope_parameters"]
    assert fingerprint(load(file)) == fingerprint(load(model))


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("outtype", ["f16", "q8_0", "q4_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_nl", "q3_k_m", "q5_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_values_are_those_of_transformers(tmp_path, family, outtype):
    settings = {"attention_bias": True} if family == "llama" else {}
    settings |= {} if outtype in ("f16", "q8_0", "q4_0") else WIDE
    _, file = make_gguf(tmp_path, family, outtype, **settings)
    found = inspect_checkpoint(find_checkpoint(str(file)))
    dtype = torch.float16 if outtype == "f16" else torch.bfloat16
    config = read_config(found.folder)  # their own has no biases for llama
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=dtype, config=config).state_dict()
    assert set(found.tensors) == set(theirs)
    for name, info in found.tensors.items():
        assert torch.equal(read_tensor(info), theirs[name]), name
        if len(info.shape) == 2 and info.shape[0] > 40:
            assert torch.equal(read_rows(info, 7, 30), theirs[name][7:37]), name


SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}  # bytes of a block's F16; else its first bytes
SCALES |= dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2))


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "IQ4_XS", *SCALES])
def test_every_type_is_the_gguf_package_s(tmp_path, kind):
    """Random blocks with scales that are finite; rows of llama's order are gathered from the right places."""
    values, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    generator = np.random.default_rng(0)
    raw = generator.integers(0, 256, (64, 2 * size), dtype=np.uint8)
    halves = raw.reshape(-1, size)
    for place in SCALES.get(kind, (0,)):
        halves[:, place : place + 2] = np.array([0.01], np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", raw, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = read_header(tmp_path / "t.gguf").tensors["blk.0.attn_q.weight"]
    expected = torch.from_numpy(gguf.dequantize(raw, Kind[kind]))
    assert stored.shape == (64, 2 * values)
    assert torch.equal(Blocks("q", stored).rows(3, 40), expected[3:43])
    order = [h * 16 + 2 * i + half for h in range(4) for half in range(2) for i in range(8)]
    assert torch.equal(Blocks("q", stored, 4, 16).rows(0, 64), expected[order])
    assert torch.equal(Blocks("q", stored, 4, 16).rows(13, 9), expected[order][13:22])


def smollm():
    tokenizer = make_tokenizer()
    digits = pre_tokenizers.Digits(individual_digits=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, plain])
    return tokenizer


@pytest.mark.parametrize("tokenizer", [None, smollm()], ids=["gpt-2", "smollm"])
def test_tokens_and_template_are_those_of_the_checkpoint(tmp_path, tokenizer):
    model, file = make_gguf(tmp_path, vocab_size=320, tokenizer=tokenizer)
    ours, theirs = load_tokenizer(str(file)), load_tokenizer(str(model))
    for text in [*TEXTS, *TEXT, "2 mugs, 12 of  345", "<|pad|><|im_end|> x"]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])
    cuts = [t.backend_tokenizer.pre_tokenizer.pre_tokenize_str(PROBE + " 2  12") for t in (ours, theirs)]
    assert [span for _, span in cuts[0]] == [span for _, span in cuts[1]]
    assert ours.chat_template == theirs.chat_template
    for name in ("bos_token", "eos_token", "pad_token", "all_special_tokens"):
        assert getattr(ours, name) == getattr(theirs, name), name


def run_settings(file, folder, **more):
    rows = write_rows(folder / "rows.jsonl", chat_rows(12))
    how = {"max_seq_length": 128, "max_steps": 1, "gradient_accumulation_steps": 2, "r": 4, "device": "cpu"}
    return TrainConfig(model=str(file), data=str(rows), output=str(folder / "run"), **{**how, **more})


def test_a_run_names_the_file_and_is_merged_into_16_bits(tmp_path):
    """The record of the base, resume, merge and generation find the file again, and its folder gets no file."""
    model, _ = make_gguf(tmp_path)
    (tmp_path / "base").mkdir()
    file = (tmp_path / "m.gguf").rename(tmp_path / "base" / "m.gguf")
    before = file.read_bytes()
    config = run_settings(file, tmp_path)
    result = run_training(config, False, make_console(True))
    adapter = result.adapter
    config_file = json.loads((adapter / "adapter_config.json").read_text())
    assert read_origin(adapter).model == str(file) == config_file["base_model_name_or_path"]
    assert any("GGUF Q8_0" in line for line in prepare(config).notes)
    run_training(run_settings(file, tmp_path, max_steps=2), True, make_console(True))
    assert origin_of(load(file), "x").sample == read_origin(adapter).sample
    merge(str(file), str(adapter), str(tmp_path / "merged"))
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in merged and merged["dtype"] == "bfloat16"
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names and "model.gguf" not in names
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert read.dtype == torch.bfloat16 and load_tokenizer(str(tmp_path / "merged")).chat_template
    with pytest.raises(UserError, match="the one that the adapter was trained on"):
        merge(str(model), str(adapter), str(tmp_path / "wrong"))
    assert [path.name for path in file.parent.iterdir()] == ["m.gguf"] and file.read_bytes() == before


def test_a_paged_base_is_the_same(tmp_path):
    _, file = make_gguf(tmp_path)
    assert fingerprint(load(file, weights_budget=60_000, page_folder=tmp_path)) == fingerprint(load(file))


def test_the_parts_of_a_split_file_are_one_model(tmp_path):
    _, file = make_gguf(tmp_path)
    whole = fingerprint(load(file))
    header, half = gguf.GGUFReader(file), len(gguf.GGUFReader(file).tensors) // 2
    for number, tensors in enumerate((header.tensors[:half], header.tensors[half:]), 1):
        writer = gguf.GGUFWriter(tmp_path / f"s-{number:05d}-of-00002.gguf", "llama")
        for name, field in header.fields.items() if number == 1 else ():
            kind, value = field.types[0], field.contents()
            if not name.startswith("GGUF.") and name != "general.architecture":
                writer.add_key_value(name, value, kind, field.types[-1] if len(field.types) > 1 else None)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(header.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    first = tmp_path / "s-00001-of-00002.gguf"
    assert fingerprint(load(first)) == whole
    make_folder = find_checkpoint(str(first))
    assert len(inspect_checkpoint(make_folder).files) == 2
    with pytest.raises(UserError, match="named by its first part"):
        load(tmp_path / "s-00002-of-00002.gguf")
    second = tmp_path / "s-00002-of-00002.gguf"
    second.rename(tmp_path / "away")
    with pytest.raises(UserError, match="no s-00002"):
        load(first)
    shutil.copyfile(first, tmp_path / "alone.gguf")
    with pytest.raises(UserError, match="all its 2 parts"):
        load(tmp_path / "alone.gguf")


def test_a_file_that_is_replaced_gets_another_folder(tmp_path):
    _, file = make_gguf(tmp_path)
    first = find_checkpoint(str(file))
    assert find_checkpoint(str(file)) == first
    _, other = make_gguf(tmp_path / "other", "qwen2")
    shutil.copyfile(other, file)
    assert find_checkpoint(str(file)) != first and read_config(find_checkpoint(str(file))).model_type == "qwen2"


def test_a_tokenizer_that_is_not_whole_in_the_file_is_asked_for(tmp_path):
    """sentencepiece's is refused, taken from --tokenizer, kept with the adapter, compared with the file's tokens."""
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    make_checkpoint(tmp_path / "plain", vocab_size=len(tokenizer))
    for path in (tmp_path / "plain").glob("*token*"):
        path.unlink()
    model, file = make_gguf(tmp_path, vocab_size=len(tokenizer), tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"byte-level BPE(.|\n)*--tokenizer DIR"):
        prepare(run_settings(file, tmp_path))
    result = run_training(run_settings(file, tmp_path, tokenizer=str(model)), False, make_console(True))
    kept = load_tokenizer(str(file), result.adapter)
    assert [kept(text)["input_ids"] for text in TEXT] == [tokenizer(text)["input_ids"] for text in TEXT]
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"must have the tokens of m\.gguf"):
        prepare(run_settings(file, tmp_path, tokenizer=str(tmp_path / "other")))
    with pytest.raises(UserError, match="must be a folder with a tokenizer"):
        prepare(run_settings(file, tmp_path, tokenizer=str(tmp_path)))


def change_metadata(file, change):
    """Write a GGUF file again with other metadata."""
    reader = gguf.GGUFReader(file)
    fields = {name: (field.contents(), field.types) for name, field in reader.fields.items()}
    change(fields)
    writer = gguf.GGUFWriter(file.with_suffix(".new"), fields["general.architecture"][0])
    for name, (value, types) in fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").rename(file)


def number(key, value, kind=gguf.GGUFValueType.UINT32):
    return lambda fields: fields.update({key: (value, [kind])})


FLOAT, STRING = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.STRING
REFUSED = {
    "another family": (number("general.architecture", "mamba", STRING), "must be one of llama"),
    "an adapter": (number("general.type", "adapter", STRING), "must hold a model"),
    "experts": (number("llama.expert_count", 8), "llama.expert_count = 8"),
    "a key that is not known": (number("llama.attention.scale", 0.5, FLOAT), "llama.attention.scale = 0.5"),
    "another scaling": (number("llama.rope.scaling.type", "longrope", STRING), "rope.scaling.type"),
    "a part of the heads": (number("llama.rope.dimension_count", 8), "must turn whole heads"),
    "another vocabulary": (number("llama.vocab_size", 5), "for 5 tokens"),
    "a token outside": (number("tokenizer.ggml.eos_token_id", 9999), "eos_token_id 9999"),
    "no layers": (number("llama.block_count", 0), "block_count 0"),
    "another pre-tokenizer": (number("tokenizer.ggml.pre", "default", STRING), "pre-tokenizer"),
    "another tokenizer": (number("tokenizer.ggml.model", "bert", STRING), "byte-level BPE"),
    "no pre-tokenizer": (lambda fields: fields.pop("tokenizer.ggml.pre"), "byte-level BPE"),
    "no architecture": (number("general.architecture", "", STRING), "must be one of llama"),
    "fewer layers than the file": (number("llama.block_count", 1), "not part of the model|exactly the model's"),
    "more layers than the file": (number("llama.block_count", 3), "every linear must have its weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused(tmp_path, case):
    change, expected = REFUSED[case]
    _, file = make_gguf(tmp_path, outtype="bf16")
    change_metadata(file, change)
    with pytest.raises(UserError, match=expected):
        load(file)
        load_tokenizer(str(file))


def patch(at, raw):
    return lambda content: content[:at] + raw + content[at + len(raw) :]


def kind_of(name, code):
    """Give a tensor another type: after its name are the number of dimensions, the dimensions and the type."""

    def change(content):
        at = content.index(name) + len(name)
        return patch(at + 4 + 8 * content[at], code.to_bytes(4, "little"))(content)

    return change


def offset_of(name, offset):
    def change(content):
        at = content.index(name) + len(name)
        return patch(at + 8 + 8 * content[at], offset.to_bytes(8, "little"))(content)

    return change


def scale_of(name, raw):
    """Replace the first scale of a tensor of Q8_0."""

    def change(content):
        (at,) = {t.data_offset for t in gguf.GGUFReader(PATHS[0]).tensors if t.name == name}
        return patch(at, raw)(content)

    return change


PATHS: list = []
BROKEN = {
    "truncated data": (lambda content: content[:-1000], "truncated in"),
    "truncated header": (lambda content: content[:2000], "end inside the header"),
    "empty": (lambda content: b"", "must begin with GGUF"),
    "another file": (lambda content: b"PK\3\4" + content, "must begin with GGUF"),
    "a pointer of git-lfs": (lambda content: b"version https://git-lfs", "a pointer of git-lfs"),
    "version 1": (patch(4, b"\1\0\0\0"), "version 1"),
    "big-endian": (patch(4, b"\0\0\0\3"), "a big-endian file"),
    "more tensors": (patch(8, (1 << 60).to_bytes(8, "little")), "must be whole"),
    "more keys": (patch(16, (1 << 60).to_bytes(8, "little")), "must be whole"),
    "a long key": (patch(24, (1 << 62).to_bytes(8, "little")), "end inside the header"),
    "MXFP4": (kind_of(b"blk.0.ffn_up.weight", 39), "MXFP4"),
    "an unknown type": (kind_of(b"blk.0.ffn_up.weight", 200), "type 200"),
    "overlapping tensors": (offset_of(b"blk.1.ffn_up.weight", 32), "where another tensor is"),
    "an offset outside": (offset_of(b"blk.1.ffn_up.weight", 1 << 40), "truncated in"),
    "NaN": (scale_of("blk.0.ffn_up.weight", b"\0\x7e"), "every weight must be finite"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_files_are_refused(tmp_path, case):
    change, expected = BROKEN[case]
    _, file = make_gguf(tmp_path)
    PATHS[:] = [file]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=expected) as caught:
        load(file)
    assert "m.gguf" in str(caught.value)


def test_any_flipped_byte_of_the_header_is_an_error_or_harmless(tmp_path):
    """No flip hangs, fails otherwise, or reads past the file."""
    _, file = make_gguf(tmp_path, vocab_size=320)
    content = bytearray(file.read_bytes())
    size = min(t.data_offset for t in gguf.GGUFReader(file).tensors)
    generator = np.random.default_rng(0)
    for at in generator.integers(0, size, 300):
        kept = content[at]
        content[at] ^= int(generator.integers(1, 256))
        file.write_bytes(content)
        content[at] = kept
        try:
            header = read_header(file)
        except UserError:
            continue
        assert all(stored.begin + stored.nbytes <= len(content) for stored in header.tensors.values())


def test_a_folder_of_gguf_files_says_to_pass_the_file(tmp_path):
    model, file = make_gguf(tmp_path)
    (model / "model.safetensors").unlink()
    file.rename(model / "m.gguf")
    with pytest.raises(UserError, match=r"pass .*m\.gguf"):
        load(model)


def test_the_plan_is_that_of_the_checkpoint(tmp_path):
    model, file = make_gguf(tmp_path)
    ours, theirs = (read_model(inspect_checkpoint(find_checkpoint(str(path)))) for path in (file, model))
    assert ours.itemsize == theirs.itemsize and ours.num_weights == theirs.num_weights
    assert isinstance(load_tokenizer(str(file)), PreTrainedTokenizerFast)
