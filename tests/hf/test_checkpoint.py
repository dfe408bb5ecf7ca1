"""Exact: each kind of damage is an error that names file and tensor."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

import onecard
from onecard.errors import UserError
from onecard.hf.checkpoint import check_dtypes, inspect_checkpoint, read_header, zeros_at_end
from onecard.hf.fingerprint import fingerprint
from onecard.hf.load import load_tokenizer
from onecard.hf.skeleton import read_config
from onecard.hf.stored import read_tensor
from tests.conftest import make_checkpoint

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sound"))


def edit(change):
    """Damage done to the tensors."""

    def damage(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def edit_header(change):
    """Damage done to the header's JSON; the data stays."""

    def damage(folder):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return damage


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def wrong_index(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    mapping = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    mapping[Q] = "../a.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def missing_shard(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    mapping = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
    mapping[Q] = "b.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def index_without_metadata(folder):
    missing_shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {Q: "a.safetensors"}}))


def edit_config(**fields):
    """Damage done to config.json."""

    def damage(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def write(text):
    """Another file under the name of the weights."""
    return lambda folder: (folder / "model.safetensors").write_text(text)


def own_code(folder):
    edit_config(model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})(folder)
    (folder / "evil.py").write_text("raise SystemExit('the checkpoint ran its code')")


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def set_value(name, value):
    def change(tensors):
        tensors[name].view(-1)[5] = value

    return edit(change)


DAMAGES = {
    "missing linear": (edit(lambda t: t.pop(Q)), Q),
    "missing norm": (edit(lambda t: t.pop(NORM)), NORM),
    "missing head": (edit(lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    "extra tensor": (edit(lambda t: t.update({"model.more.weight": torch.zeros(4)})), "model.more.weight"),
    "wrong shape of a linear": (edit(lambda t: t.update({Q: torch.zeros(64, 32)})), Q),
    "wrong shape of a norm": (edit(lambda t: t.update({NORM: torch.zeros(32)})), NORM),
    "NaN in a linear": (set_value(Q, float("nan")), Q),
    "Inf in a norm": (set_value(NORM, float("inf")), NORM),
    "NaN in the embedding": (set_value("model.embed_tokens.weight", float("nan")), "model.embed_tokens.weight"),
    "int8 weights": (edit(lambda t: t.update({Q: t[Q].to(torch.int8)})), Q),
    "truncated file": (truncate, "model.safetensors"),
    "overlapping tensors": (
        edit_header(lambda h: h[Q].update(data_offsets=[n - 64 for n in h[Q]["data_offsets"]])),
        "model.safetensors",
    ),
    "bytes do not fit shape": (edit_header(lambda h: h[Q].update(shape=[64, 65])), Q),
    "unknown dtype": (edit_header(lambda h: h[Q].update(dtype="Q4")), Q),
    "header not JSON": (
        lambda f: (f / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"x" * 16),
        "model.safetensors",
    ),
    "header longer than the file": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 16), "model.safetensors"),
    "index outside the folder": (wrong_index, "../a.safetensors"),
    "missing shard": (missing_shard, "b.safetensors"),
    "pickle only": (pickled, "pytorch_model.bin"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "a page of HTML": (write("<!doctype html><title>404</title>"), "model.safetensors"),
    "a pointer of git-lfs": (write("version https://git-lfs.github.com/spec/v1\nsize 12\n"), "git lfs pull"),
    "bytes after the last tensor": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"x"),
        "longer than its tensors",
    ),
    "a shape of true": (edit_header(lambda h: h[Q].update(shape=[True, 4096])), Q),
    "index without metadata": (index_without_metadata, "metadata"),
    "a config of an unknown model": (edit_config(model_type="llamma"), "config.json"),
    "a config that contradicts itself": (edit_config(num_attention_heads=5), "config.json"),
    "a config with a number as text": (edit_config(hidden_size="64"), "config.json"),
    "an activation of no name": (edit_config(hidden_act="silly"), "config.json"),
    "a config of fewer layers": (edit_config(num_hidden_layers=1), "model.layers.1"),
    "a config of more layers": (edit_config(num_hidden_layers=3), "model.layers.2"),
    "an adapter among its files": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json"),
    "code of its own": (own_code, "config.json"),
    "quantized by another": (edit_config(quantization_config={"quant_method": "hqq"}), "hqq"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_damage_is_named(kind, sound, tmp_path):
    damage, named = DAMAGES[kind]
    folder = tmp_path / "copy"
    shutil.copytree(sound, folder)
    damage(folder)
    with pytest.raises(UserError) as error:
        onecard.load_model(str(folder), device="cpu")
    assert named in str(error.value)


def test_code_in_a_checkpoint_is_never_asked_for(sound, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(sound, folder)
    own_code(folder)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question"))
    with pytest.raises(UserError, match="never run"):
        read_config(folder)
    path = folder / "tokenizer_config.json"
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer))
    with suppress(UserError):  # transformers may find a class of its own that reads the same files
        load_tokenizer(str(folder))


def test_a_tail_of_zeros_is_warned_of(sound, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(sound, folder)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    assert zeros_at_end(path) < 64
    path.write_bytes(raw[:-70_000] + bytes(70_000))
    assert zeros_at_end(path, step=999) == zeros_at_end(path) >= 70_000
    with pytest.warns(UserWarning, match="bytes of zeros"):
        onecard.load_model(str(folder), device="cpu")


def test_a_sharded_checkpoint_loads_the_same(sound, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(sound).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(inspect_checkpoint(tmp_path).files) > 2
    ids = torch.tensor([[5, 6, 7]])
    one, many = (onecard.load_model(str(f), device="cpu")(ids).logits for f in (sound, tmp_path))
    assert torch.equal(one, many)


def test_the_fingerprint_sees_a_changed_weight(sound, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(sound, folder)
    one, same = (fingerprint(onecard.load_model(str(f), device="cpu")) for f in (sound, folder))
    assert one == same
    set_value(Q, 3.0)(folder)
    assert fingerprint(onecard.load_model(str(folder), device="cpu")) != one


def test_a_path_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        onecard.load_model(str(tmp_path / "absent"))


def with_tensor(folder, name, tensor):
    save_file({name: tensor}, folder / "model.safetensors")
    return read_header(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["int32", "int16", "uint8", "int8", "float8_e4m3fn", "uint32"])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mixer.A_log", Q])
def test_integers_are_no_weights_whatever_they_are_called(name, dtype, tmp_path):
    tensors = with_tensor(tmp_path, name, torch.ones(4, 4).to(getattr(torch, dtype)))
    with pytest.raises(UserError, match="float tensors") as error:
        check_dtypes(tensors, {})
    assert name in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.float64])
def test_positions_masks_and_floats_are_read_as_they_are(dtype, tmp_path):
    made = torch.tensor([[0, 1], [1, 0]], dtype=dtype)
    tensors = with_tensor(tmp_path, "model.position_ids", made)
    check_dtypes(tensors, {})
    assert torch.equal(read_tensor(tensors["model.position_ids"]), made)
