"""Exact: `generate --prompts` gives each prompt the answer that it gets alone, in order, and goes on after any end."""

import json
import os

import pytest
import torch
from peft import get_peft_model

from onecard.adapter.layers import lora_config
from onecard.cli import app as cli
from onecard.config import LoraSettings, SamplingConfig, make_config
from onecard.errors import UserError
from onecard.hf.load import load_model, load_tokenizer
from onecard.infer import prompts as files
from onecard.infer.generate import GREEDY, generate
from tests.conftest import write_rows

ROWS = [
    {"prompt": "how many mugs?", "id": 7},
    {"messages": [{"role": "user", "content": "a much longer question about blue mugs and red cups"}]},
    {"prompt": "ünï \u2028 code"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "how many?"}], "id": None},
    {"prompt": "1"},
]


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_model(str(checkpoint), compute_dtype="float32", device="cpu"), load_tokenizer(str(checkpoint))


def run(checkpoint, prompts, *more):
    words = ["generate", "--model", checkpoint, "--prompts", prompts, "--max-new-tokens", "12", "--device", "cpu"]
    cli(list(map(str, [*words, "--compute-dtype", "float32", *more])), result_action="return_value")


def alone(loaded, messages, sampling=GREEDY):
    ids = files.prompt_ids(messages, loaded[1])
    return generate(*loaded, ids, 12, sampling)


def messages_of(row, system=None):
    asked = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
    first = [] if system is None or asked[0]["role"] == "system" else [{"role": "system", "content": system}]
    return [*first, *asked]


@pytest.mark.parametrize("batch, system", [(1, None), (2, "Be kind."), (8, None)])
def test_each_answer_is_the_one_that_its_prompt_gets_alone(checkpoint, loaded, tmp_path, capsys, batch, system):
    prompts, output = write_rows(tmp_path / "p.jsonl", ROWS), tmp_path / "a.jsonl"
    more = ["--system", system] if system else []
    run(checkpoint, prompts, "--output", output, "--batch-size", batch, *more)
    found = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    expected = [alone(loaded, messages_of(row, system)) for row in ROWS]
    assert [row["answer"] for row in found] == expected and len(set(expected)) > 2
    assert [{k: v for k, v in row.items() if k not in files.ADDED} for row in found] == ROWS
    assert {row["finish_reason"] for row in found} <= {"stop", "length"} and "5 of 5" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["p.jsonl", "a.jsonl"] or sorted(os.listdir(tmp_path)) == ["a.jsonl", "p.jsonl"]


def test_lines_of_text_are_prompts_and_go_to_the_screen(checkpoint, loaded, tmp_path, capsys):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfhow many?\r\n\n  two words \n")
    run(checkpoint, tmp_path / "p.txt", "--temperature", "1", "--seed", "3")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in found] == ["how many?", "  two words "]
    for i, row in enumerate(found):
        asked = [{"role": "user", "content": row["prompt"]}]
        assert row["answer"] == alone(loaded, asked, SamplingConfig(temperature=1, seed=3 + i)), "a seed of its own"


def test_the_same_command_goes_on_and_another_one_is_refused(checkpoint, tmp_path, monkeypatch):
    prompts, output, part = write_rows(tmp_path / "p.jsonl", ROWS), tmp_path / "a.jsonl", tmp_path / "a.jsonl.part"
    how = ("--output", output, "--temperature", "1", "--seed", "5")
    write, written = files.Output.write, []

    def stops(self, line):
        if len(written) == 4:  # the settings and three answers
            self.file.write(line.encode()[:9])  # a kill cuts a line
            raise KeyboardInterrupt
        written.append(line)
        write(self, line)

    monkeypatch.setattr(files.Output, "write", stops)
    with pytest.raises(SystemExit):
        run(checkpoint, prompts, *how)
    monkeypatch.undo()
    assert not output.exists() and part.read_text().count("\n") == 4 and part.read_text()[-1] != "\n"
    before = part.read_bytes()
    for other in (["--top-k", "5"], ["--system", "x"], ["--batch-size", "2"], ["--no-raw"]):
        with pytest.raises(UserError, match="must all be of the same settings"):
            run(checkpoint, prompts, *how, *other)
    write_rows(tmp_path / "q.jsonl", ROWS[::-1])
    with pytest.raises(UserError, match="must all be of the same settings"):
        run(checkpoint, tmp_path / "q.jsonl", *how)
    assert part.read_bytes() == before
    monkeypatch.setattr(files, "seeded", lambda s, i, own=files.seeded: written.append(i) or own(s, i))
    run(checkpoint, prompts, *how)
    assert written[4:] == [3, 4], "only the others are made" and not part.exists()
    run(checkpoint, prompts, *how[2:], "--output", tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(UserError, match="never written over"):
        run(checkpoint, prompts, *how)


def test_the_adapter_answers(checkpoint, loaded):
    base, tokenizer = load_model(str(checkpoint), compute_dtype="float32", device="cpu"), loaded[1]
    settings = make_config(LoraSettings, {"r": 4, "target_modules": ["q_proj", "v_proj"]})
    tuned = get_peft_model(base, lora_config(settings)).eval()
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    asked = [[{"role": "user", "content": text}] for text in ("how many mugs?", "two blue ones")]
    prompts = [(files.prompt_ids(messages, tokenizer), False) for messages in asked]
    expected = [generate(tuned, tokenizer, ids, 12) for ids, _ in prompts]
    found = [each.text for each in files.answers(tuned, tokenizer, prompts, 12, GREEDY, (), 2)]
    assert found == expected != [alone(loaded, messages) for messages in asked]


def test_two_commands_do_not_write_one_file(tmp_path):
    first = files.Output(str(tmp_path / "a"), {}, 3)
    with pytest.raises(UserError, match="one process at a time"):
        files.Output(str(tmp_path / "a"), {}, 3)
    first.close()
    files.Output(str(tmp_path / "a"), {}, 3).close()


WRONG = {  # lines, and what must hold
    "no file": (None, "must exist"),
    "no prompt": ("\n", "there must be a prompt"),
    "another suffix": ("a", "must be a .jsonl or .txt file"),
    "not JSON": ('{"prompt": "a"}\n{"prompt', "2:row: a row must be JSON"),
    "not an object": ('["a"]', "1:row: a row must be a JSON object"),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', "a key must occur once"),
    "NaN": ('{"prompt": "a", "id": NaN}', "a number must be one that JSON has"),
    "neither prompt nor messages": ('{"text": "a"}', 'must have "prompt" or "messages"'),
    "both": ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', 'must have "prompt" or "messages"'),
    "a prompt that is no text": ('{"prompt": 5}', "prompt: Input should be a valid string"),
    "an unknown role": ('{"messages": [{"role": "human", "content": "a"}]}', "messages.0.role"),
    "an answer at the end": ('{"messages": [{"role": "assistant", "content": "a"}]}', "last message must ask"),
    "a key of answers": ('{"prompt": "a", "answer": "b"}', 'must not have "answer"'),
    "tools without messages": (
        '{"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]}', "tools are for messages"
    ),
    "not UTF-8": (b'{"prompt": "\xff"}', "a row must be UTF-8"),
}  # fmt: skip


def use_wrong(folder, kind):
    """Read a wrong file of prompts."""
    path, lines = folder / ("p.csv" if kind == "another suffix" else "p.jsonl"), WRONG[kind][0]
    path.unlink(missing_ok=True)
    if lines is not None:
        path.write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    files.read_prompts(str(path))


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_of_prompts_is_told_with_its_line(tmp_path, kind):
    with pytest.raises(UserError) as found:
        use_wrong(tmp_path, kind)
    assert WRONG[kind][1] in str(found.value) and str(found.value).startswith(f"{tmp_path}/p.")


def test_what_cannot_be_asked_is_told_before_the_weights_load(checkpoint, tmp_path, monkeypatch):
    prompts = write_rows(tmp_path / "p.jsonl", ROWS)
    monkeypatch.setattr("onecard.cli.answering.load", lambda *_: pytest.fail("the weights were loaded"))
    for words, must in (
        (["--raw"], "messages need a chat template"),
        (["--batch-size", "0"], "batch_size"),
        (["--prompt", "a"], "either --prompt or --prompts"),
        (["--output", tmp_path / "nowhere" / "a.jsonl"], "a folder that is there"),
    ):
        with pytest.raises(UserError, match=must):
            run(checkpoint, prompts, *words)
    with pytest.raises(UserError, match="--output is for"):
        cli(["generate", str(checkpoint), "--prompt", "a", "--output", "o"], result_action="return_value")


def test_an_answer_that_fails_ends_the_command(loaded, monkeypatch):
    def fails(*_):
        raise RuntimeError("no memory for this")

    monkeypatch.setattr(files.GenerationRequest, "begin", fails)
    with pytest.raises(UserError, match="no memory for this"):
        list(files.answers(*loaded, [([5, 6], False)], 3, SamplingConfig(temperature=0), (), 2))
    with pytest.raises(UserError, match="a bias must be of one"):
        list(files.answers(*loaded, [([5], False)], 3, SamplingConfig(logit_bias={10**9: 1}), (), 2))
