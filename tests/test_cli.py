"""Behaviour: the commands as a user types them; no library says anything on stderr."""

import json
import re
import shutil

import pytest

from tests.conftest import chat_rows, make_tokenizer, write_rows
from tests.forks import onecard


@pytest.fixture(scope="module")
def trained(checkpoint, chats, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "o"
    code, out, err = onecard(
        "train", "--model", checkpoint, "--data", chats, "--output", output, "--max-steps", 3, "--device", "cpu"
    )
    assert code == 0 and not err, err
    return output, out


def test_train_says_what_it_will_do_and_where_it_lies(trained):
    output, out = trained
    for said in (
        "messages",
        "share supervised",
        "[[0 blue mugs",
        "memory plan",
        "learning rate",
        "step 3/3",
        "report.html",
    ):
        assert said in out, said
    assert (output / "adapter" / "adapter_model.safetensors").is_file()


def test_report_makes_the_report_of_a_run_again_and_runs_lists_it(trained):
    output, _ = trained
    before = {name: (output / name).read_bytes() for name in ("loss_curve.png", "report.md", "report.html")}
    for name in before:
        (output / name).unlink()
    code, out, err = onecard("report", output)
    assert code == 0 and "report.html" in out and not err, err
    assert {name: (output / name).read_bytes() for name in before} == before
    code, out, err = onecard("runs", output.parent)
    assert code == 0 and "finished  3/3" in out and out.splitlines()[1].endswith(output.name), out + err


def test_generate_and_eval_with_the_adapter(trained, checkpoint, tmp_path):
    adapter = trained[0] / "adapter"
    code, out, err = onecard(
        "generate", "--model", checkpoint, "--adapter", adapter, "--prompt", "how many?", "--max-new-tokens", 8
    )
    assert code == 0 and out.strip() and not err, err
    data = write_rows(tmp_path / "d.jsonl", [{**row, "source": "web"} for row in chat_rows(2)])
    code, out, err = onecard("eval", "--model", checkpoint, "--adapter", adapter, "--data", data)
    assert code == 0 and "perplexity" in out and err == 'note: "source" is not used: 2 rows\n'


def test_the_adapter_s_own_tokenizer_is_taken(trained, checkpoint, chats, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(trained[0] / "adapter", adapter)
    make_tokenizer("{{ raise_exception('mine') }}").save_pretrained(adapter)
    where = ("--model", checkpoint, "--adapter", adapter)
    merging = ("--output", tmp_path / "m", "--verify", chats)
    for command, more in (("eval", ("--data", chats)), ("merge", merging)):
        code, _, err = onecard(command, *where, *more)
        assert code == 2 and "mine" in err, err


def test_export_says_how_to_use_what_it_wrote(trained, checkpoint, chats, tmp_path):
    code, out, err = onecard(
        "export", "--model", checkpoint, "--adapter", trained[0] / "adapter", "--data", chats, "--format", "gptq",
        "--output", tmp_path / "o", "--num-rows", 2, "--max-seq-length", 64, "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and f"vllm serve {tmp_path / 'o'}" in out, err
    assert all(line.startswith("note: ") for line in err.splitlines()), err
    assert (tmp_path / "o" / "quantize_config.json").is_file()


def test_merge_verifies_and_tells_what_4_bits_leave(trained, checkpoint, chats, tmp_path):
    where = ("--model", checkpoint, "--adapter", trained[0] / "adapter")
    code, out, err = onecard("merge", *where, "--output", tmp_path / "m", "--verify", chats)
    assert code == 0 and not err and out.startswith("verifying on "), err
    for said in ("live adapter", "dequantized", "original", "kept", "merged   "):
        assert said in out, said
    assert (tmp_path / "m" / "model.safetensors").is_file()
    code, out, err = onecard("merge", *where, "--output", tmp_path / "q", "--requantize", "nf4")
    assert code == 0 and "of the update in the weights" in out and not err, err
    code, _, err = onecard("merge", *where, "--output", tmp_path / "x", "--quant-type", "fp4")
    assert code == 2 and "quant_type nf4" in err and not (tmp_path / "x").exists()


def test_chat_answers_and_ends(checkpoint):
    talk = "hello\n/reset\nagain\n/quit\n"
    code, out, err = onecard("chat", "--model", checkpoint, "--max-new-tokens", 4, stdin=talk)
    assert code == 0 and out.count("you") >= 3 and not err, err


def test_mistakes_exit_with_2_and_no_traceback(checkpoint, tmp_path):
    bad = write_rows(tmp_path / "d.jsonl", [*chat_rows(2), {"messages": [{"role": "robot", "content": ""}]}])
    for args, said in (
        (("train", "--modle", "x"), "--model"),
        (("train", "--model", checkpoint, "--data", bad, "--output", tmp_path / "o"), "d.jsonl:3:messages[0].role"),
        (("preview", "--model", tmp_path / "none", "--data", bad), "no such folder"),
        (("preview", "--model", checkpoint), "a preview needs data"),
    ):
        code, _, err = onecard(*args)
        assert code == 2 and said in err and "Traceback" not in err, err


def test_a_preview_of_a_file_of_train(checkpoint, tmp_path):
    """Its sources have columns of their own, which no flag can give; a flag wins over the file."""
    named = write_rows(tmp_path / "n.jsonl", [{"q": "how?", "a": "two blue mugs"}] * 3)
    chats = write_rows(tmp_path / "c.jsonl", chat_rows(3))
    data = [{"path": str(named), "columns": {"prompt": "q", "completion": "a"}}, {"path": str(chats), "max_rows": 2}]
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"model": str(checkpoint), "data": data, "r": 4}))
    code, out, err = onecard("preview", "--config", file, "--num-examples", 2)
    flat = out.replace("\n", "")
    assert (
        code == 0 and "n.jsonl:1" in flat and "c.jsonl:1" in flat and re.search(r"^examples +5$", out, re.MULTILINE)
    ), out + err
    code, out, err = onecard("preview", "--config", file, "--data", chats)
    assert code == 0 and re.search(r"^examples +3$", out, re.MULTILINE), out + err
    file.write_text(json.dumps({"model": str(checkpoint), "data": data, "rank": 4}))
    code, _, err = onecard("preview", "--config", file)
    assert code == 2 and "rank" in err, err


def test_lists_of_flags_and_help(checkpoint, chats, tmp_path):
    code, out, err = onecard(
        "train", "--model", checkpoint, "--data", chats, "--output", tmp_path / "[red]o", "--max-steps", 1,
        "--target-modules", "q_proj", "--target-modules", "v_proj", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "[red]o/report.html" in out
    saved = json.loads((tmp_path / "[red]o" / "adapter" / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == ["q_proj", "v_proj"]
    assert "Folder of a trained adapter" in onecard("generate", "--help")[1]


def test_a_list_takes_several_names_after_its_flag(checkpoint):
    code, out, err = onecard("plan", "--model", checkpoint, "--target-modules", "q_proj", "v_proj", "--r", 8, "--json")
    assert code == 0, err
    terms = {term["name"]: term["num_bytes"] for term in json.loads(out)["terms"]}
    code, out, err = onecard("plan", checkpoint, "--target-modules", "q_proj,v_proj", "--r", 8, "--json")
    assert terms == {term["name"]: term["num_bytes"] for term in json.loads(out)["terms"]}
