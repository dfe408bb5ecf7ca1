"""Behaviour: merges measured against the live adapter. Exact: what is kept, and that nothing else is left behind."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import onecard
from onecard.cli.writing import quantize
from onecard.config import DataConfig, ExportConfig, QuantConfig, QuantizeConfig
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.export.merge.merged import merge
from onecard.export.merge.quantized import requantize
from onecard.export.readers import load_written
from onecard.export.verify import (
    Agreement,
    bases_of,
    better,
    merge_verified,
    rows_to_verify,
    verify_export,
    verify_quantized,
)
from onecard.hf.load import load_tokenizer
from onecard.nn.linear import Linear4bit
from tests.conftest import FAMILIES, make_checkpoint
from tests.export.merge.test_merged import make_adapter

BOTH = ["dequantized", "original"]


@pytest.fixture(params=[torch.bfloat16])
def tuned(tmp_path, chats, request):
    base = make_checkpoint(tmp_path / "base", dtype=request.param)
    make_adapter(tmp_path / "adapter", base)
    dataset = load_dataset(str(chats), load_tokenizer(str(base)), DataConfig())
    return str(base), str(tmp_path / "adapter"), dataset.take(list(range(8)))


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("tuned", [torch.float32, torch.bfloat16], indirect=True)
def test_both_bases_are_measured_and_the_nearer_one_is_kept(tuned, tmp_path):
    """Merged into what training saw, the rounding of the weights is all that is off. Random weights give near-ties in
    plenty, so that bfloat16's rounding changes some likeliest tokens here."""
    model, adapter, dataset = tuned
    found = merge_verified(model, adapter, str(tmp_path / "merged"), dataset, BOTH)
    near, far = found.tried
    exact = AutoConfig.from_pretrained(model).dtype == torch.float32
    assert near.off < (1e-4 if exact else 0.02) and abs(near.kept - 1) < 0.01
    assert near.argmax >= (1.0 if exact else 0.95)
    assert far.off > 5 * near.off
    assert abs(near.loss - found.live.loss) < 0.01 * found.live.loss
    merge(model, adapter, str(tmp_path / "plain"), found.kept)
    a, b = tensors(tmp_path / "merged"), tensors(tmp_path / "plain")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {p.name for p in (tmp_path / "plain").iterdir()}
    assert not list(tmp_path.glob(".*"))
    lines = found.table()
    assert len(lines) == 4 and sum(line.endswith("kept") for line in lines[1:]) == 1


def test_the_original_base_is_kept_only_where_its_loss_is_surely_lower():
    losses = torch.rand(200, generator=torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(200, generator=torch.Generator().manual_seed(1))

    def tried(shift):
        return [Agreement(*fields) for fields in (("a", 0.0, 1.0, 1.0, losses), ("b", 0.1, 1.0, 1.0, losses + shift))]

    assert better(tried(noise - noise.mean())) == "a"
    assert better(tried(noise - 0.05)) == "b"


def test_an_adapter_without_effect_has_no_shares(tuned, tmp_path):
    model, adapter, dataset = tuned
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t * (0 if "lora_B" in n else 1) for n, t in load_file(path).items()}, path)
    found = merge_verified(model, adapter, str(tmp_path / "merged"), dataset, BOTH)
    assert found.live.off is None and all(one.off is None and one.kept is None for one in found.tried)
    assert "changes nothing" in found.table()[-1] and "nan" not in "".join(found.table())
    assert requantize(model, adapter, str(tmp_path / "small"), QuantConfig())[1].share is None


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_requantized_says_what_is_left(quant_type, tuned, tmp_path):
    """Exact: the share, against the same sums over whole weights; the files are what quantize makes of the merge."""
    model, adapter, dataset = tuned
    quant = QuantConfig(quant_type=quant_type)
    folder, left = requantize(model, adapter, str(tmp_path / "small"), quant)
    found = onecard.load_model(str(folder), compute_dtype="float32", device="cpu")
    before = onecard.load_model(model, compute_dtype="float32", device="cpu")
    A_B = {n.removeprefix("base_model.model."): t for n, t in load_file(f"{adapter}/adapter_model.safetensors").items()}
    along = whole = noise = 0.0
    for name, module in before.named_modules():
        if isinstance(module, Linear4bit):
            W = module.dequantize().double()
            D = 2.0 * (A_B[f"{name}.lora_B.weight"] @ A_B[f"{name}.lora_A.weight"]).double()
            change = found.get_submodule(name).dequantize().double() - W
            along += (change * D).sum().item()
            noise += (change - left.share * D).square().sum().item()
            whole += D.square().sum().item()
    assert left.share == pytest.approx(along / whole, rel=1e-5)
    assert left.noise == pytest.approx((noise / whole) ** 0.5, rel=1e-5)
    assert 0.0 < left.share < 1.2 and left.noise > 0
    verified = merge_verified(model, adapter, str(tmp_path / "again"), dataset, ["dequantized"], None, quant)
    assert verified.in_weights == left
    assert verified.tried[0].off > 0.02
    a, b = tensors(folder), tensors(tmp_path / "again")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, on saved embeddings
def test_added_tokens_are_measured_too(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, added=3, modules_to_save=["embed_tokens", "lm_head"])
    dataset = load_dataset(str(chats), load_tokenizer(str(base)), DataConfig()).take([0, 1])
    where = (str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    found = merge_verified(*where, dataset, ["dequantized"], device="auto")
    assert found.tried[0].off < 1e-4 and found.tried[0].argmax == 1.0


def test_what_cannot_be_is_told_before_anything_runs(tuned, tmp_path):
    model, adapter, dataset = tuned
    small, _ = requantize(model, adapter, str(tmp_path / "small"), QuantConfig())
    assert bases_of(model, None) == BOTH
    assert bases_of(model, QuantConfig()) == bases_of(str(small), None) == ["dequantized"]
    with pytest.raises(UserError, match="auto, cpu, cuda"):
        merge_verified(model, adapter, str(tmp_path / "x"), dataset, BOTH, device="gpu")
    with pytest.raises(UserError, match="nf4 and fp4"):
        merge_verified(model, adapter, str(tmp_path / "x"), dataset, BOTH, None, QuantConfig(quant_type="int4"))
    with pytest.raises(UserError, match="original weights"):
        merge_verified(str(small), adapter, str(tmp_path / "x"), dataset, BOTH)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_read_back_in_float32_it_is_the_float32_model(family, tmp_path):
    """The same sums in another order: float32's rounding."""
    folder = make_checkpoint(tmp_path / "m", family, dtype=torch.bfloat16)
    ids = torch.randint(5, 200, (1, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = load_written(folder, "cpu")(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 64 * torch.finfo(torch.float32).eps * expected.norm()


CALIBRATION = {"group_size": 32, "num_rows": 2, "max_seq_length": 64}
FORMATS = {"gguf": {"outtype": "q8_0"}, "gptq": CALIBRATION, "awq": CALIBRATION, "w4a16": {"group_size": 32}}
FORMATS |= {"fp8": {}, "nvfp4": {}, "mlx": {}}


@pytest.mark.parametrize("format", FORMATS)
def test_every_export_is_measured_and_a_file_without_the_adapter_shows(format, tuned, tmp_path, chats, monkeypatch):
    """The file with the adapter has most of its effect. The file of the base alone has none, and is far off."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of GGUF's settings
    model, adapter, _ = tuned
    data = {"data": str(chats)} if format in ("gptq", "awq") else {}
    fields = {"format": format, "model": model, "device": "cpu", **FORMATS[format], **data}
    config = ExportConfig(adapter=adapter, output=str(tmp_path / "with"), verify=str(chats), **fields)
    found = onecard.export(config)
    without = onecard.export(ExportConfig(output=str(tmp_path / "without"), verify=str(chats), **fields))
    quant, rows = QuantConfig(), rows_to_verify(config)
    lines = [found.lines[1:4], without.lines[1:4], verify_export(config, without.path, quant, rows)[1:4]]
    assert found.lines[0].startswith("verifying on 24 of 24 rows")
    header = lines[0][0].split()
    assert header == "off by effect kept error same token right token loss bytes".split()
    shares = []
    for table in lines:
        name, off, kept, error, same, *_, nbytes = table[2].split()
        assert name == format and float(error) > 0 and 0 < float(same.rstrip("%")) <= 100
        files = [found.path] if found.path.is_file() else found.path.glob("*.safetensors")
        assert int(nbytes.replace(",", "")) == sum(file.stat().st_size for file in files)
        shares.append((off, kept, float(error)))
    assert lines[1][1].startswith("the model") and shares[1][:2] == ("-", "-")
    (off, kept, error), (base_off, base_kept, base_error) = shares[0], shares[2]
    off, kept, base_off, base_kept = (float(share.rstrip("%")) for share in (off, kept, base_off, base_kept))
    assert abs(kept - 100) < 15 and off < 60 and error < 0.5 * base_error
    assert abs(base_kept) < 30 and base_off > 90


def test_a_gguf_file_without_a_reader_is_refused_before_it_is_written(tmp_path, chats):
    base = make_checkpoint(tmp_path / "base", "mixtral")
    where = {"format": "gguf", "model": str(base), "output": str(tmp_path / "m.gguf")}
    with pytest.raises(UserError, match=r"verify reads GGUF files of llama,[^\0]*mixtral, with experts"):
        onecard.export(ExportConfig(verify=str(chats), **where))
    assert not (tmp_path / "m.gguf").exists()
    with pytest.raises(ValueError, match="verify reads a whole model"):
        ExportConfig(verify=str(chats), adapter_only=True, **where)


def test_quantize_compares_what_onecard_and_bitsandbytes_read_with_the_model(tmp_path, chats, capsys):
    """With other codes of one matrix, both readers say that it is further away."""
    pytest.importorskip("bitsandbytes")
    base = make_checkpoint(tmp_path / "base", intermediate_size=128)  # bitsandbytes on a CPU needs rows of whole blocks
    quantize(str(base), str(tmp_path / "q"), fields=QuantizeConfig(verify=str(chats), device="cpu"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("(nf4)") and said[1].startswith("verifying on 24 of 24 rows")
    model, ours, theirs = (line.split() for line in said[3:6])
    assert model[:2] == ["the", "model"] and ours[0] == "onecard" and theirs[0] == "bitsandbytes"
    assert float(ours[3]) > 0 and ours[3:7] == theirs[3:7]  # error, tokens and loss to the last digit that is shown
    file = tmp_path / "q" / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.0.mlp.up_proj.weight"].bitwise_not_()
    save_file(stored, file, metadata={"format": "pt"})
    dataset = load_dataset(str(chats), load_tokenizer(str(base)), DataConfig())
    far = [line.split() for line in verify_quantized(str(base), tmp_path / "q", dataset, "cpu")[3:5]]
    assert all(float(line[3]) > 1.5 * float(ours[3]) for line in far)
