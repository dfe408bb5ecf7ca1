"""Exact: a run that adds tokens: its tokenizer, its rows, resumed, gone on from, merged and answering."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import onecard
from onecard.adapter.load import with_adapter
from onecard.config import DataConfig
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.export.merge.merged import merge
from onecard.export.verify import merge_verified
from onecard.hf.load import load_tokenizer
from onecard.infer.generate import generate
from onecard.train import session
from onecard.train.loss import packed_loss
from tests.conftest import make_checkpoint, write_rows
from tests.train.test_loop import adapter_bytes, copy_at, run

ADDED = {"add_tokens": ["<think>", "</think>"], "add_special_tokens": ["<|x|>"]}
ROWS = "base_model.model.{}.token_adapter.trainable_tokens_delta"
EMBEDDING, HEAD = ROWS.format("model.embed_tokens"), ROWS.format("lm_head")
MORE = {"max_steps": 3, "lora_dropout": 0.0, "learning_rate": 1e-2, "validation_split": 0.2, **ADDED}


def thoughts(count):
    """Chats whose answers have new tokens. The question spells a special one."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"how many <|x|> mugs {i}?"},
                {"role": "assistant", "content": f"<think>{i} of the fox</think>{i} mugs"},
            ]
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "thoughts.jsonl", thoughts(12))


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    base = make_checkpoint(folder / "base", tie_word_embeddings=request.param, dtype=torch.bfloat16)
    result = run(base, data, folder / "o", **MORE)
    return base, folder / "o", result


def test_the_run(trained):
    base, output, result = trained
    assert result.report.loss_after < result.report.loss_before - 1
    said = "<think> 10, </think> 10, <|x|> 0"
    assert result.report.facts["new tokens in the training rows"] == said
    tied = AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings
    stored = load_file(output / "adapter" / "adapter_model.safetensors")
    names = {name for name in stored if "lora" not in name}
    assert names == ({EMBEDDING} if tied else {EMBEDDING, HEAD})
    before = AutoTokenizer.from_pretrained(base)
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name, key in ((EMBEDDING, "model.embed_tokens.weight"), (HEAD, "lm_head.weight")):
        if name in names:
            assert stored[name].dtype == torch.float32 and stored[name].shape == (3, 64)
            for text, row in zip(("<think>", "</think>", "<|x|>"), stored[name]):
                pieces = before(text, add_special_tokens=False)["input_ids"]
                far = (row - weights[key][pieces].float().mean(0)).abs().max()
                assert 0 <= far <= 3.1e-2  # three updates of at most the rate each
                assert far > 1e-3 or (text == "<|x|>" and name == EMBEDDING)
    tokenizer = load_tokenizer(str(base), output / "adapter")
    assert len(tokenizer) == len(before) + 3
    ids = tokenizer("<think>a</think><|x|>", add_special_tokens=False)["input_ids"]
    assert ids[0] == len(before) and ids[-2:] == [len(before) + 1, len(before) + 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think>"


def test_merged_and_loaded_are_the_run(trained, tmp_path):
    base, output, result = trained
    ids = torch.tensor([[7, 304, 20, 305, 306, 9]])
    with torch.no_grad():
        live = result.model(ids).logits
        loaded = onecard.load_model(str(base), compute_dtype="float32", device="cpu")
        loaded = with_adapter(loaded, str(output / "adapter"))
        assert torch.equal(loaded(ids).logits, live) and live.shape[-1] == 307
        merge(str(base), str(output / "adapter"), str(tmp_path / "merged"))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        found = merged(ids).logits
    assert merged.config.vocab_size == 307 and found.shape == live.shape
    assert (found - live).norm() <= 2e-2 * live.norm()  # its weights are rounded to bfloat16
    rows = load_file(output / "adapter" / "adapter_model.safetensors")[EMBEDDING]
    assert torch.equal(merged.get_input_embeddings().weight[304:], rows.bfloat16().float())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<|x|>"]) == [304, 305, 306]
    rows = load_dataset(result.report.config["data"], result.tokenizer, DataConfig(max_seq_length=96))
    verified = merge_verified(str(base), str(output / "adapter"), str(tmp_path / "v"), rows, ["dequantized"])
    assert verified.tried[0].off < 0.1


def test_a_killed_run_ends_in_the_same_bits(trained, data, tmp_path):
    base, output, _ = trained
    copy_at(output, tmp_path / "o", 1)
    run(base, data, tmp_path / "o", resuming=True, **MORE)
    assert adapter_bytes(tmp_path / "o") == adapter_bytes(output)
    for other in ({"add_tokens": ["<think>"]}, {"add_special_tokens": None}):
        with pytest.raises(UserError, match="settings it began with"):
            run(base, data, tmp_path / "o", resuming=True, **{**MORE, **other})


def test_a_run_goes_on(trained, data, tmp_path):
    base, output, first = trained
    adapter = str(output / "adapter")
    second = run(base, data, tmp_path / "o", **{**MORE, "adapter": adapter, "max_steps": 1})
    assert second.report.loss_before == first.report.loss_after
    wrong = [{"add_tokens": ["</think>", "<think>"]}, {"add_tokens": ["<think>"]}, {"add_tokens": ["<a>", "<b>"]}]
    for other in (*wrong, {"add_tokens": None, "add_special_tokens": None}):
        with pytest.raises(UserError, match="must add the adapter's tokens") as error:
            run(base, data, tmp_path / "p", **{**MORE, "adapter": adapter, **other})
        assert "<think>, </think>, <|x|>" in error.value.found


def test_whole_ends_that_grow(trained, data, tmp_path):
    """modules_to_save with embedding and head: both get the rows, all are trained in full, and merge carries them."""
    base, _, _ = trained
    more = {**MORE, "modules_to_save": ["embed_tokens", "lm_head"]}
    result = run(base, data, tmp_path / "o", **more)
    assert result.report.loss_after < result.report.loss_before - 1
    ids = torch.tensor([[7, 304, 20, 305, 306, 9]])
    merge(str(base), str(tmp_path / "o" / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        live, found = result.model(ids).logits, merged(ids).logits
    assert live.shape[-1] == 307 and (found - live).norm() <= 2e-2 * live.norm()
    second = run(base, data, tmp_path / "p", **{**more, "adapter": str(tmp_path / "o" / "adapter"), "max_steps": 1})
    assert second.report.loss_before == result.report.loss_after
    with pytest.raises(UserError, match="embedding and head, or neither"):
        run(base, data, tmp_path / "q", **{**MORE, "modules_to_save": ["lm_head"]})


def test_a_paged_base(trained, data, tmp_path, monkeypatch):
    base, _, result = trained
    losses = [row["loss"] for row in result.metrics]
    seen = []
    choose = session.choose_loss
    monkeypatch.setattr(session, "choose_loss", lambda *args: seen.append(choose(*args)) or seen[-1])
    paged = run(base, data, tmp_path / "o", **MORE, weights_budget="1MiB")
    assert [row["loss"] for row in paged.metrics] == pytest.approx(losses, rel=1e-4)
    assert seen[0][0] is packed_loss


def test_preferences(trained, tmp_path):
    """The reference has the rows of the start: before the training, the policy is the reference."""
    base, _, _ = trained
    rows = [
        {"prompt": f"how many {i}?", "chosen": f"<think>a</think>{i} mugs", "rejected": "<think>the fox"}
        for i in range(6)
    ]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    for name, more in {"dpo": {}, "orpo": {"packing": False}}.items():
        more = {**MORE, "validation_split": 0.0, "loss": name, "max_steps": 2, **more}
        result = run(base, pairs, tmp_path / name, **more)
        assert all(torch.isfinite(torch.tensor(row["loss"])) for row in result.metrics)
        if name == "dpo":
            assert result.metrics[0]["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)


@pytest.mark.parametrize("number, text", [(0, "<think>"), (2, "<|x|>")])
def test_an_answer_can_be_a_new_token(trained, number, text):
    """A row that always wins, in the whole way from the prompt to the text."""
    base, output, result = trained
    tokenizer = load_tokenizer(str(base), output / "adapter")
    ids = tokenizer("how many?")["input_ids"]
    head = result.model.get_base_model().get_output_embeddings().token_adapter
    rows = head.trainable_tokens_delta["default"].data
    with torch.no_grad():
        hidden = result.model.get_base_model().model(torch.tensor([ids])).last_hidden_state[0, -1]
    before = rows.clone()
    try:
        rows[number] = 100 * hidden / hidden.norm()
        found = generate(result.model, tokenizer, ids, 1)
    finally:
        rows.copy_(before)
    assert found == text


def test_refused_before_the_weights_load(checkpoint, data, tmp_path, monkeypatch):
    monkeypatch.setattr("onecard.train.session.load_model", lambda *_: pytest.fail("the weights were loaded"))
    wrong = [
        ({"add_tokens": ["<a>", "<a>"]}, "each token once"),
        ({"add_tokens": "<a>,,<b>"}, "not empty"),
        ({"add_tokens": ["<a b>"]}, "white space"),
        ({"add_tokens": ["<a>"], "add_special_tokens": ["<a>"]}, "in both"),
        ({"add_tokens": ["none.txt"]}, "none.txt"),
        ({"add_tokens": ["<a>", "none.txt"]}, "alone"),
        ({"add_tokens": ["<|im_end|>"]}, "must be new"),
        ({"add_tokens": ["<a>"], "calibrate": True}, "leave add_tokens out"),
    ]
    for fields, said in wrong:
        with pytest.raises(UserError) as error:
            run(checkpoint, data, tmp_path / "o", **fields)
        assert said in str(error.value), (fields, str(error.value))
    small = make_checkpoint(tmp_path / "small", vocab_size=303)  # the tokenizer has 304
    with pytest.raises(UserError, match="a row for each token of its tokenizer"):
        run(small, data, tmp_path / "o", add_tokens=["<a>"])


def test_free_rows_and_a_file(data, tmp_path):
    """A padded vocabulary has rows for the tokens: nothing grows. A token that is there already is told."""
    base = make_checkpoint(tmp_path / "base", vocab_size=320)
    (tmp_path / "tokens.txt").write_text("<think>\n</think>\n<|im_end|>\n")
    more = {**MORE, "add_special_tokens": None, "add_tokens": [str(tmp_path / "tokens.txt")]}
    result = run(base, data, tmp_path / "o", **more)
    assert result.report.loss_after < result.report.loss_before - 1
    config = json.loads((tmp_path / "o" / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [304, 305], "lm_head": [304, 305]}
    merge(str(base), str(tmp_path / "o" / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.tensor([[7, 304, 20, 305, 9]])
    with torch.no_grad():
        live, found = result.model(ids).logits, merged(ids).logits
    assert live.shape[-1] == 320 and (found - live).norm() <= 1e-4 * live.norm()
    (tmp_path / "tokens.txt").write_text("<think>\n</think>\n<more>\n")
    shutil.rmtree(tmp_path / "o" / "adapter")
    with pytest.raises(UserError, match="new tokens it began with"):
        run(base, data, tmp_path / "o", resuming=True, **more)
