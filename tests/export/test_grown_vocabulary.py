"""Exact: every export of an adapter with new tokens has their rows and their names, and no other size."""

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import onecard
from onecard.api import export
from onecard.config import ExportConfig, QuantConfig
from onecard.errors import UserError
from onecard.export.merge.merged import merge
from onecard.export.merge.quantized import quantize_checkpoint, requantize
from tests.conftest import make_checkpoint, write_rows
from tests.forks import onecard as command
from tests.train.test_loop import run
from tests.train.test_new_tokens import ADDED, thoughts

TOKENS = ["<think>", "</think>", "<|x|>"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request, tmp_path_factory):
    """A base, an adapter, the rows of the run, the merged model's logits on some tokens."""
    folder = tmp_path_factory.mktemp("grown")
    base = make_checkpoint(folder / "base", tie_word_embeddings=request.param, intermediate_size=128)
    data = write_rows(folder / "rows.jsonl", thoughts(8))
    run(base, data, folder / "o", max_steps=2, lora_dropout=0.0, **ADDED)
    merge(str(base), str(folder / "o" / "adapter"), str(folder / "merged"))
    return str(base), str(folder / "o" / "adapter"), str(data), folder / "merged"


def logits(folder, ids):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


IDS = torch.tensor([[7, 304, 20, 305, 306, 9]])


def check_folder(folder, merged):
    """Config, tokenizer, embedding and head are those of the merged checkpoint."""
    assert AutoConfig.from_pretrained(folder).vocab_size == 307
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(TOKENS) == [304, 305, 306]
    found, wanted = load_file(folder / "model.safetensors"), load_file(merged / "model.safetensors")
    ends = [name for name in wanted if name in ("model.embed_tokens.weight", "lm_head.weight")]
    assert ends and all(torch.equal(found[name], wanted[name]) and len(found[name]) == 307 for name in ends)
    assert set(ends) == {name for name in found if name in ("model.embed_tokens.weight", "lm_head.weight")}


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_gptq_and_awq(trained, format, tmp_path):
    base, adapter, data, merged = trained
    fields = {"model": base, "adapter": adapter, "data": data, "max_seq_length": 96, "group_size": 32}
    export(ExportConfig(format=format, output=str(tmp_path / "out"), **fields))
    check_folder(tmp_path / "out", merged)


def test_a_4bit_folder(trained, tmp_path):
    base, adapter, _, merged = trained
    requantize(base, adapter, str(tmp_path / "out"), QuantConfig())
    check_folder(tmp_path / "out", merged)
    found = onecard.load_model(str(tmp_path / "out"), compute_dtype="float32", device="cpu")(IDS).logits
    wanted = logits(merged, IDS)
    assert found.shape == wanted.shape and (found - wanted).norm() < 0.5 * wanted.norm()


def test_gguf(trained, tmp_path):
    base, adapter, _, merged = trained
    export(ExportConfig(format="gguf", model=base, adapter=adapter, output=str(tmp_path / "m.gguf"), outtype="f16"))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.tokens"][304:] == TOKENS and fields["llama.vocab_size"] == 307
    kinds = [gguf.TokenType.USER_DEFINED, gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL]
    assert fields["tokenizer.ggml.token_type"][304:] == kinds
    rows = {t.name: t for t in reader.tensors}
    wanted = load_file(merged / "model.safetensors")["model.embed_tokens.weight"].half()
    assert torch.equal(torch.from_numpy(rows["token_embd.weight"].data.copy()), wanted)
    assert ("output.weight" in rows) == ("lm_head.weight" in load_file(merged / "model.safetensors"))
    assert (tmp_path / "m.Modelfile").read_text().startswith("FROM ./m.gguf")
    with pytest.raises(UserError, match="rows of new tokens"):
        alone = {"output": str(tmp_path / "a.gguf"), "adapter_only": True}
        export(ExportConfig(format="gguf", model=base, adapter=adapter, **alone))


def test_over_a_base_in_4_bits(trained, tmp_path):
    """An adapter over a 4-bit checkpoint: merged into 16 bits, with its rows."""
    base, _, data, _ = trained
    quantize_checkpoint(base, str(tmp_path / "base"), QuantConfig())
    result = run(tmp_path / "base", data, tmp_path / "o", max_steps=2, lora_dropout=0.0, **ADDED)
    merge(str(tmp_path / "base"), str(tmp_path / "o" / "adapter"), str(tmp_path / "merged"))
    with torch.no_grad():
        live, found = result.model(IDS).logits, logits(tmp_path / "merged", IDS)
    assert found.shape == live.shape and (found - live).norm() <= 1e-4 * live.norm()


@pytest.mark.parametrize("trained", [False], indirect=True)
def test_the_commands(trained, tmp_path):
    base, adapter, data, _ = trained
    run_on_cpu = ("--model", base, "--device", "cpu")
    code, out, err = command("generate", *run_on_cpu, "--adapter", adapter, "--prompt", "how many?")
    assert code == 0, err
    code, out, err = command("eval", *run_on_cpu, "--adapter", adapter, "--data", data)
    assert code == 0 and "loss" in out, err
    flags = ("--add-tokens", "<think>,</think>", "--add-special-tokens", "<|x|>")
    code, out, err = command("train", *run_on_cpu, "--data", data, "--output", tmp_path / "o", "--validate", *flags)
    assert code == 0 and not err and not list(tmp_path.iterdir()), err
    assert "new tokens in the training rows: <think> 8, </think> 8, <|x|> 0" in out
    assert "<|x|> is in none of the training rows" in out and "new tokens' rows" in out
    code, out, err = command("plan", *run_on_cpu, *flags)
    assert code == 0 and "new tokens' rows" in out, err
    code, out, err = command("preview", "--model", base, "--data", data, *flags)
    assert code == 0 and "<think> 8" in out, err
