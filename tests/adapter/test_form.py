"""Behaviour: an adapter is asked as its rows were written, and stops where they stopped."""

import json
import shutil

import pytest
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, GenerationConfig

import onecard
from onecard.adapter.form import ask, form_ids, form_of, template_digest
from onecard.adapter.load import with_adapter
from onecard.adapter.origin import FILE, Form, form_beside, read_origin
from onecard.adapter.save import save_adapter
from onecard.config import DataConfig, GgufConfig, TrainConfig, make_config
from onecard.data.chat.mask import prompt_ids, text_ids
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.export.gguf.modelfile import modelfile
from onecard.export.gguf.writer import export_gguf
from onecard.export.merge.merged import merge
from onecard.hf.load import load_tokenizer
from onecard.infer.chat import Talk
from onecard.infer.decoding import end_tokens
from onecard.train.session import run_training
from tests.conftest import chat_rows, make_checkpoint, make_tokenizer, write_rows

HARMONY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|start|>assistant<|channel|>' }}"
    "{{ m['thinking'] + '<|end|>' if m['thinking'] else '' }}{{ '<|message|>' + m['content'] }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}"
    "{{ '<|start|>' + m['role'] + '<|message|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|channel|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model with ChatML whose EOS ends no turn."""
    folder = make_checkpoint(tmp_path_factory.mktemp("base"))
    tokenizer = make_tokenizer(specials=("<|endoftext|>",), eos_token="<|endoftext|>", pad_token="<|pad|>")
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**found, "eos_token_id": tokenizer.eos_token_id}))
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "o"
    data = write_rows(output.parent / "chats.jsonl", chat_rows(8))
    fields = {"model": str(base), "data": str(data), "output": str(output), "max_steps": 1, "device": "cpu"}
    run_training(make_config(TrainConfig, {**fields, "sample_prompts": []}), False, Console(quiet=True))
    return output / "adapter"


def dataset_of(rows, tokenizer, tmp_path, **settings):
    return load_dataset(str(write_rows(tmp_path / "rows.jsonl", rows)), tokenizer, DataConfig(**settings))


def test_the_token_that_closed_the_turns_is_kept_and_used(trained, base, tmp_path):
    tokenizer = load_tokenizer(str(base))
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    assert end != eos
    form = form_beside(trained)
    assert form == Form(prompt="chat", template=template_digest(tokenizer), end_tokens=(end,))
    assert end_tokens(eos, tokenizer, form.end_tokens) == [eos, end]
    merged = merge(str(base), str(trained), str(tmp_path / "merged"))
    assert GenerationConfig.from_pretrained(merged).eos_token_id == [eos, end]
    assert AutoModelForCausalLM.from_pretrained(merged).generation_config.eos_token_id == [eos, end]


def test_a_gguf_file_s_modelfile_stops_there(trained, base, tmp_path):
    pytest.importorskip("gguf")
    export_gguf(str(base), str(trained), str(tmp_path / "a.gguf"), GgufConfig(adapter_only=True))
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "a.Modelfile").read_text()


def test_a_talk_ends_there(trained, base, monkeypatch):
    class Asked(Exception):
        pass

    def answer(*_, ends):
        raise Asked(ends)

    monkeypatch.setattr("onecard.infer.chat.Answer", answer)
    form = form_beside(trained)
    talk = Talk(onecard.load_model(str(base), device="cpu"), load_tokenizer(str(base)), Console(), 8, 0.0, form)
    talk.messages.append({"role": "user", "content": "two mugs"})
    with pytest.raises(Asked) as asked:
        talk.answer()
    assert asked.value.args == (form.end_tokens,) and form.end_tokens


def test_a_turn_that_was_cut_tells_no_end(tmp_path):
    tokenizer = make_tokenizer()
    whole = form_of(dataset_of(chat_rows(4), tokenizer, tmp_path), tokenizer, None)
    cut = form_of(dataset_of(chat_rows(4), tokenizer, tmp_path, max_seq_length=48), tokenizer, None)
    assert whole.end_tokens == (tokenizer.eos_token_id,)
    assert set(cut.end_tokens) <= {tokenizer.eos_token_id}


def test_a_token_inside_a_turn_does_not_end_an_answer(tmp_path):
    """Harmony's <|end|> closes earlier answers, and thoughts before an answer: only <|return|> ends."""
    names = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
    tokenizer = make_tokenizer(HARMONY, names, eos_token="<|return|>")
    ask = {"role": "user", "content": "two mugs"}
    turns = [ask, {"role": "assistant", "content": "red"}, ask]
    turns += [{"role": "assistant", "content": "blue", "thinking": "the fox"}]
    form = form_of(dataset_of([{"messages": turns}] * 2, tokenizer, tmp_path), tokenizer, None)
    assert form.end_tokens == (tokenizer.eos_token_id,)


def test_the_prompt_is_the_training_s(tmp_path):
    tokenizer, plain = make_tokenizer(), make_tokenizer(None)
    rows = [{"prompt": "two mugs", "completion": " blue"}] * 2
    form = form_of(dataset_of(rows, tokenizer, tmp_path), tokenizer, template_digest(tokenizer))
    assert (form.prompt, form.template) == ("completion", None)
    ids, goes_on, told = ask("two mugs", tokenizer, form, None)
    assert (ids, goes_on, told) == (text_ids("two mugs", tokenizer), True, None)
    ids, goes_on, told = ask("two mugs", tokenizer, form, False)
    assert ids == prompt_ids([{"role": "user", "content": "two mugs"}], tokenizer) and not goes_on
    assert "plain prompts" in told
    rows = [{"instruction": "two mugs", "output": "blue"}] * 2
    dataset = dataset_of(rows, plain, tmp_path)
    form = form_of(dataset, plain, None)
    assert form.prompt == "alpaca"
    ids = ask("two mugs", plain, form, None)[0]
    example = dataset.examples[0]
    assert ids == [t for t, label in zip(example.input_ids, example.labels) if label == -100]
    chat = Form(prompt="chat", template="0" * 64)
    assert "not the one" in ask("x", tokenizer, chat, None)[2]
    assert "goes in as it is" in ask("x", tokenizer, chat, True)[2]


def test_an_adapter_of_single_prompts_refuses_a_talk():
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two mugs"}]
    with pytest.raises(UserError, match="single prompts"):
        form_ids(turns, make_tokenizer(), Form(prompt="completion"))


def test_a_modelfile_of_another_form():
    tokenizer = make_tokenizer()
    text, notes = modelfile("FROM x", tokenizer, [3], Form(prompt="alpaca"))
    assert "### Instruction:\n{{ .Prompt }}\n\n### Response:\n" in text
    assert "alpaca's headings" in notes[0]
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile("FROM x", tokenizer, [3], Form(prompt="text"))[0]
    tools = make_tokenizer(tokenizer.chat_template + "{% if tools %}{{ tools }}{% endif %}")
    text, notes = modelfile("FROM x", tools, [3])
    assert "TEMPLATE" in text and "leaves out tools" in notes[0]


@pytest.mark.parametrize("share", [i / 7 for i in range(7)])
def test_a_flipped_bit_is_named(share, trained, base, tmp_path):
    for path in sorted(trained.iterdir()):
        if path.name == "README.md":
            continue
        folder = tmp_path / path.stem
        shutil.copytree(trained, folder)
        raw = bytearray(path.read_bytes())
        raw[int(share * len(raw))] ^= 1
        (folder / path.name).write_bytes(raw)
        with pytest.raises(UserError) as error:
            read_origin(folder)
        assert path.name in str(error.value)


def test_a_file_that_is_gone_is_named(trained, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        folder = tmp_path / name
        shutil.copytree(trained, folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match="no such file") as error:
            read_origin(folder)
        assert error.value.where == str(folder / name)


def test_a_changed_adapter_loads_once_the_file_is_deleted(trained, base, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    model = onecard.load_model(str(base), device="cpu")
    with pytest.raises(UserError, match="delete"):
        with_adapter(model, str(folder))
    with pytest.raises(UserError, match="as training wrote them"):
        merge(str(base), str(folder), str(tmp_path / "merged"))
    (folder / FILE).unlink()
    with_adapter(model, str(folder))


def test_an_older_adapter_stays_where_the_new_one_cannot_be_written(trained, base, tmp_path, monkeypatch):
    folder = tmp_path / "adapter"
    shutil.copytree(trained, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = with_adapter(onecard.load_model(str(base), device="cpu"), str(folder))
    assert isinstance(model, PeftModel)
    origin = read_origin(folder)

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("onecard.adapter.save.write_origin", fail)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, folder, origin)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    save_adapter(model, folder, origin)
    assert read_origin(folder).model == origin.model
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
