"""Behaviour: the page's server, on a port of this machine: guard, runs, stop, plan, preview, command, chat."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import httpx
import psutil
import pytest

from onecard.cli import app as cli
from onecard.config import StudioConfig, TrainConfig, make_config, parse_bytes
from onecard.data.chat.mask import IGNORE
from onecard.data.load import load_dataset
from onecard.errors import UserError
from onecard.hf.load import load_tokenizer
from onecard.memory.plan import plan
from onecard.studio import prepare
from onecard.studio.app import Studio, fields_of, make_server, text_of
from onecard.studio.jobs import Jobs
from onecard.studio.runs import Runs, differences
from onecard.studio.talk import load_service
from onecard.studio.writing import words_of
from onecard.terminal import joined_flags
from onecard.train.record import FILE
from tests.conftest import write_rows
from tests.train.test_run_folders import record_of

DEMO = Path(__file__).parents[2] / "onecard" / "demo"
BASE, DATA = str(DEMO / "base"), str(DEMO / "data" / "heldout.jsonl")
STATIC = Path(__file__).parents[2] / "onecard" / "studio" / "static"
KEY = "a-secret"
VENDORED = {  # sha256 of the packages' own files: preact 10 in htm 3.1.1, uplot 1.6.32
    "preact-htm.js": "72284e8e9079c87817145df1110f74e8a2aa040b2fc384922e18dfcb46fc1fd7",
    "uplot.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "uplot.js": "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba",
}


class Running:
    """The page's server in a thread."""

    def __init__(self, **fields):
        self.studio = Studio(StudioConfig(port=0, **fields))
        self.server = make_server(self.studio)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def post(self, path, **content):
        return self.client.post(path, json=content)

    def stop(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def until(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    made = Running(root=str(tmp_path_factory.mktemp("root")))
    yield made
    made.stop()


# ---- the guard ----


def test_the_page_and_its_files_name_no_other_host(page):
    """Offline: all that the page loads is its own, and the policy that browsers enforce says so."""
    answer = page.client.get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    for path in STATIC.rglob("*"):
        if path.suffix in (".js", ".css", ".html"):
            found = page.client.get(f"/static/{path.relative_to(STATIC).as_posix()}")
            assert found.status_code == 200 and found.headers["content-security-policy"] == policy, path
            if path.parent.name != "vendor":
                assert not re.search(r"https?://|//[a-z]+\.", found.text), path
    assert {"main.js", "studio.css"} <= set(re.findall(r"/static/([\w.]+)\"", answer.text))


def test_bundled_files_are_the_packages_own_with_their_licences():
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (STATIC / "vendor").iterdir()}
    assert {name: found[name] for name in VENDORED} == VENDORED
    assert set(found) - set(VENDORED) == {"LICENSE-htm", "LICENSE-preact", "LICENSE-uplot"}


@pytest.mark.parametrize(
    "method, path, headers, status",
    [
        ("GET", "/", {"host": "evil.example"}, 421),
        ("GET", "/api/info", {"host": "evil.example"}, 421),
        ("POST", "/api/stop", {"content-type": "text/plain"}, 415),
        ("POST", "/api/train", {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/api/stop", {"content-type": "application/json", "sec-fetch-site": "cross-site"}, 403),
        ("GET", "/api/events", {"sec-fetch-site": "same-site"}, 403),
        ("GET", "/", {"sec-fetch-site": "cross-site"}, 200),
        ("GET", "/static/%2e%2e/app.py", {}, 404),
    ],
)
def test_requests_of_others_are_refused(page, method, path, headers, status):
    assert page.client.request(method, path, headers=headers, content="{}").status_code == status


def test_a_key_opens_the_page_once_and_a_cookie_then(tmp_path):
    made = Running(root=str(tmp_path), api_key=KEY)
    try:
        with httpx.Client(base_url=made.url) as client:
            for path in ("/", "/api/info", "/static/main.js", "/?key=wrong", f"/api/info?key={KEY}"):
                assert client.get(path).status_code == 401, path
            assert client.get("/health").status_code == 200
            answer = client.get(f"/?key={KEY}")
            cookie = answer.headers["set-cookie"].lower()
            assert answer.status_code == 303 and answer.headers["location"] == "/"
            assert "httponly" in cookie and "samesite=strict" in cookie
            assert client.get("/").status_code == 200 and client.get("/api/info").status_code == 200
        headers = {"authorization": f"Bearer {KEY}"}
        assert httpx.get(f"{made.url}/api/info", headers=headers).status_code == 200
        assert httpx.get(f"{made.url}/api/info", headers={"cookie": "onecard_key=wrong"}).status_code == 401
    finally:
        made.stop()
    with pytest.raises(UserError, match="api-key"):
        StudioConfig(host="0.0.0.0")


# ---- runs ----


def test_runs_are_found_with_their_state(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        record_of(tmp_path / "a" / "live", child.pid, began=5.0)
        record_of(tmp_path / "done", state="finished", began=4.0)
        record_of(tmp_path / "gone", child.pid, process_started=1.0, began=3.0)  # another process has its number
        record_of(tmp_path / "bad", state="failed", message="no memory", began=2.0)
        (tmp_path / "old").mkdir()
        write_rows(tmp_path / "old" / "metrics.jsonl", [{"step": 3, "loss": 1.5}])
        (tmp_path / "torn").mkdir()
        (tmp_path / "torn" / FILE).write_text("{")
        (tmp_path / "a" / "live" / "checkpoints" / "x").mkdir(parents=True)
        (tmp_path / "a" / "live" / "checkpoints" / "x" / "metrics.jsonl").write_text("")
        runs = Runs(tmp_path, Jobs(tmp_path))
        rows = {row["name"]: row for row in runs.refresh()}
        states = {name: row["state"] for name, row in rows.items()}
        assert states == {
            "a/live": "running", "done": "finished", "gone": "killed", "bad": "failed", "old": "unknown",
            "torn": "unknown",
        }  # fmt: skip
        assert rows["bad"]["message"] == "no memory" and "JSON" in rows["torn"]["message"]
        assert [name for name, row in rows.items() if row["can_resume"]] == ["gone", "bad"]
        assert rows["old"]["step"] == 3 and rows["old"]["last"]["loss"] == 1.5
        for name in ("../done", "a", "/etc", "a/live/checkpoints/x"):
            with pytest.raises(UserError, match="must be in the list"):
                runs.get(name)
    finally:
        child.kill()
        child.wait()


def test_stop_asks_the_run_s_own_process_once(tmp_path):
    code = (
        "import signal, time\nsignal.signal(15, lambda *_: open('stopped', 'a').write('x'))\nopen('up', 'w')\n"
        "while True: time.sleep(.05)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        until((tmp_path / "up").exists)
        record = record_of(tmp_path / "o", child.pid)
        runs = Runs(tmp_path, Jobs(tmp_path))
        runs.refresh()
        (tmp_path / "o" / FILE).write_text(record.model_copy(update={"process_started": 1.0}).model_dump_json())
        runs.refresh()
        with pytest.raises(UserError, match="only a run that runs"):
            runs.stop("o")
        (tmp_path / "o" / FILE).write_text(record.model_dump_json())
        runs.refresh()
        runs.stop("o")
        until((tmp_path / "stopped").exists)
        assert runs.refresh()[0]["state"] == "stopping"
        with pytest.raises(UserError, match="asked to stop once"):
            runs.stop("o")
        with pytest.raises(UserError, match="goes on by itself"):
            runs.resume("o")
        time.sleep(0.2)
        assert (tmp_path / "stopped").read_text() == "x" and child.poll() is None
    finally:
        child.kill()
        child.wait()
    assert runs.refresh()[0]["state"] == "killed"


def test_resume_starts_the_same_settings_where_the_run_was_started(tmp_path, monkeypatch):
    record_of(tmp_path / "o", state="stopped", config={"r": 3, "train_on": "last"}, num_processes=2)
    jobs = Jobs(tmp_path)
    runs, begun = Runs(tmp_path, jobs), []
    monkeypatch.setattr(jobs, "start", lambda *args: begun.append(args))
    runs.refresh()
    runs.resume("o")
    ((kind, words, folder, output),) = begun
    assert (kind, folder, output) == ("train", Path.cwd(), tmp_path / "o")
    assert words[:2] == ["train", "--config"] and words[3:] == ["--resume", "--num-processes", "2"]
    read = make_config(TrainConfig, prepare.parsed(Path(words[2]).read_text()))
    assert read.model_dump(mode="json") == runs.found["o"].record.config and read.r == 3
    (tmp_path / "o").rename(tmp_path / "moved")
    runs.refresh()
    with pytest.raises(UserError, match="where it was written"):
        runs.resume("moved")


def test_a_job_is_detached_and_has_its_log_and_no_key(tmp_path, monkeypatch):
    monkeypatch.setenv("ONECARD_API_KEY", KEY)
    jobs = Jobs(tmp_path)
    job = jobs.start("export", ["--version"], tmp_path, tmp_path / "o")
    assert os.getsid(job.pid) == job.pid != os.getsid(0), "a session of its own: the terminal's end does not reach it"
    assert KEY not in Path(f"/proc/{job.pid}/environ").read_text()
    until(lambda: not job.is_running)
    assert version("onecard") in jobs.log(job.name)
    assert Jobs(tmp_path).refresh() == [job], "a server that starts again knows it"
    with pytest.raises(UserError, match="one of the page's"):
        jobs.log("../../etc/passwd")
    with pytest.raises(UserError, match="has ended"):
        jobs.stop(job.pid, job.process_started)


def test_what_differs_between_runs(tmp_path):
    records = {name: record_of(tmp_path / name, config={"r": r}) for name, r in (("a", 8), ("b", 32))}
    found = {row["name"]: row for row in differences(records)}
    assert found.keys() == {"output", "r"} and found["r"]["values"] == {"a": 8, "b": 32} and found["r"]["default"] == 16
    assert differences({"a": records["a"]}) == []


def test_events_tell_a_run_that_a_terminal_starts(page):
    output = page.studio.root / "from-a-terminal"
    with page.client.stream("GET", "/api/events") as stream:
        lines = stream.iter_lines()

        def told(holds):
            for line in lines:
                if line.startswith("data: "):
                    rows = {row["name"]: row for row in json.loads(line[6:])["runs"]}
                    if holds(rows.get("from-a-terminal")):
                        return rows["from-a-terminal"]

        record_of(output, state="finished")
        assert told(lambda row: row)["step"] == 0
        write_rows(output / "metrics.jsonl", [{"step": step, "loss": 3.0 / step} for step in range(1, 31)])
        row = told(lambda row: row and row["step"] == 30)
        assert row["last"]["loss"] == pytest.approx(0.1)
    curve = page.client.get("/api/curves", params={"run": "from-a-terminal", "points": 1000}).json()
    assert curve["from-a-terminal"]["loss"]["x"] == list(range(1, 31))
    assert page.client.get("/api/curves", params={"run": "../x"}).status_code == 400
    assert page.client.get("/api/run", params={"run": "from-a-terminal"}).json()["plan"] == [["base", 7, "P"]]
    assert page.client.get("/api/report", params={"run": "from-a-terminal"}).status_code == 400
    (output / "report.html").write_text("<script>alert(1)</script>")
    answer = page.client.get("/api/report", params={"run": "from-a-terminal"})
    assert answer.status_code == 200 and "sandbox" in answer.headers["content-security-policy"]
    assert "script-src" not in answer.headers["content-security-policy"]


def test_fifty_pages_are_told_by_one_look(page):
    looks, look = [], page.studio.board.look
    page.studio.board.look = lambda: looks.append(1) or look()
    try:
        streams = [page.client.stream("GET", "/api/events") for _ in range(50)]
        found = [stream.__enter__() for stream in streams]
        lines = [each.iter_lines() for each in found]
        for each in lines:
            assert next(each).startswith("data: ")
        begun = len(looks)
        record_of(page.studio.root / "fifty", state="finished")
        for each in lines:
            assert any('"fifty"' in line for line in each)
        assert len(looks) - begun <= 10, "one look a second for all"
        for stream in streams:
            stream.__exit__(None, None, None)
        until(lambda: page.studio.board.readers == 0)
    finally:
        page.studio.board.look = look


# ---- prepare ----


@pytest.mark.parametrize(
    "fields",
    [{}, {"r": 64}, {"max_seq_length": 512, "per_device_train_batch_size": 4}, {"gradient_checkpointing": True}],
)
@pytest.mark.parametrize("memory", ["64MiB", "8GiB"])
def test_the_plan_is_that_of_onecard_plan(page, fields, memory):
    answer = page.post("/api/plan", fields={"model": BASE, **fields}, device_memory=memory, searches=True).json()
    found = plan(BASE, "qlora", parse_bytes(memory), **fields)
    assert answer["terms"] == [vars(term) for term in found.terms] and answer["total_bytes"] == found.total_bytes
    assert answer["choice"] == found.choice and answer["fits"] == found.fits
    assert (answer["largest_length"], answer["largest_batch"]) == (found.largest_length, found.largest_batch)
    assert answer["changes"] == [vars(change) for change in found.changes]


def test_a_slider_s_plan_takes_less_than_200_ms_of_the_processor():
    planner, times = prepare.Planner(), []
    for r in (8, 16, 32, 64, 128):
        start = time.process_time()
        planner.plan({"model": "llama-3-8b", "r": r, "device": "cpu"}, "24GiB", False)
        times.append(time.process_time() - start)
    assert sorted(times[1:])[len(times) // 2] < 0.2, times
    assert len(planner.models) == 1


def test_a_changed_checkpoint_is_read_again(tmp_path, checkpoint):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    planner = prepare.Planner()
    config = make_config(TrainConfig, {"model": str(folder), "data": "-", "output": "-"})
    first = planner.model(config)
    assert planner.model(config) is first
    os.utime(folder / "config.json", (1, 1))
    assert planner.model(config) is not first


def test_the_preview_shows_the_tokens_that_the_run_learns(page):
    answer = page.post("/api/preview", fields={"model": BASE, "data": DATA, "max_seq_length": 512}).json()
    tokenizer = load_tokenizer(BASE)
    config = make_config(TrainConfig, {"model": BASE, "data": DATA, "max_seq_length": 512, "output": "-"})
    dataset = load_dataset(DATA, tokenizer, config)
    assert answer["counts"] == dataset.summary()
    assert answer["share_supervised"] == dataset.num_supervised_tokens / dataset.num_tokens
    for shown, example in zip(answer["examples"], dataset.examples, strict=False):
        ((part,), where) = shown["parts"], shown["where"]
        assert where == example.where and part["count"] == len(example.input_ids) <= prepare.SHOWN_TOKENS
        assert "".join(text for text, _ in part["tokens"]) == tokenizer.decode(example.input_ids)
        learned = "".join(text for text, is_learned in part["tokens"] if is_learned)
        kept = [token for token, label in zip(example.input_ids, example.labels) if label != IGNORE]
        assert learned == tokenizer.decode(kept)


def test_a_character_of_several_tokens_stays_whole():
    tokenizer = load_tokenizer(BASE)
    ids = tokenizer("mugs 🍵 für 茶", add_special_tokens=False)["input_ids"]
    found = list(prepare.tokens_of(ids, ids, tokenizer))
    assert "".join(text for text, _ in found) == "mugs 🍵 für 茶" and not any("\ufffd" in text for text, _ in found)
    assert len(found) > 4


def test_a_bad_row_is_told_with_file_line_and_field(page, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
    path = write_rows(tmp_path / "bad.jsonl", [*rows, {"messages": [{"role": "user", "content": 3}]}])
    answer = page.post("/api/preview", fields={"model": BASE, "data": str(path)})
    assert answer.status_code == 400 and answer.json().keys() == {"must", "found", "do", "where"}
    assert f"{path}:3" in json.dumps(answer.json()), answer.json()
    skipped = page.post("/api/preview", fields={"model": BASE, "data": str(path), "on_bad_rows": "skip"}).json()
    assert skipped["num_bad"] == 1 and f"{path}:3" in skipped["bad"][0]["where"]


def listed(config):
    """A config's fields. A flag gives one file as a list of one."""
    found = config.model_dump()
    return {**found, **{name: [found[name]] for name in ("data", "eval_data") if isinstance(found[name], str)}}


FIELDS = [
    {"model": "m", "data": "a b.jsonl", "output": "o", "r": 8, "packing": False, "learning_rate": 2e-5},
    {"model": "m", "data": ["a.jsonl:0.7", "-b.jsonl:0.3"], "output": "-o", "target_modules": ["q_proj", "v_proj"]},
    {"model": "m", "data": "d", "gradient_checkpointing": True, "use_dora": False, "weights_budget": "2GiB"},
    {"model": "m", "data": "d", "chat_template_kwargs": {"enable_thinking": False}, "sample_prompts": ["a=b", "c d"]},
    {"model": "m", "data": "d", "max_steps": 5, "eval_data": "e.jsonl", "train_on": "last"},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_the_command_line_and_the_yaml_give_the_same_run(fields):
    expected = make_config(TrainConfig, fields)
    words = prepare.command_of(fields)
    _, bound, _ = cli.parse_args(joined_flags(words), exit_on_error=False, print_error=False)
    flags = {name: value for name, value in bound.arguments["fields"].model_dump().items() if value is not None}
    assert listed(make_config(TrainConfig, flags)) == listed(expected)
    assert make_config(TrainConfig, prepare.parsed(prepare.written(fields)["yaml"])) == expected


def test_settings_that_no_flag_has_are_only_yaml(page):
    fields = {"model": "m", "data": [{"path": "a.jsonl", "max_rows": 5}], "output": "o"}
    answer = page.post("/api/command", fields=fields).json()
    assert answer["command"] is None
    assert make_config(TrainConfig, prepare.parsed(answer["yaml"])) == make_config(TrainConfig, fields)


@pytest.mark.parametrize(
    "path, content, where",
    [
        ("/api/plan", {"fields": {}}, "model"),
        ("/api/plan", {"fields": {"model": BASE, "rank": 3}}, "page"),
        ("/api/plan", {"fields": {"model": BASE, "max_seq_length": 1 << 20}}, "max_seq_length"),
        ("/api/plan", {"fields": {"model": BASE}, "device_memory": "much"}, "size"),
        ("/api/plan", {"fields": {"model": BASE}, "more": "r: [1"}, "more settings"),
        ("/api/plan", {"fields": {"model": BASE}, "more": "- r"}, "more settings"),
        ("/api/plan", {"fields": 3}, "fields"),
        ("/api/preview", {"fields": {"model": BASE}}, "data"),
        ("/api/train", {"fields": {"model": BASE, "data": DATA, "output": "/elsewhere"}}, "output"),
        ("/api/stop", {"run": 3}, "run"),
        ("/api/resume", {"run": "no-such-run"}, "run"),
        ("/api/load", {"model": BASE, "adapters": "x"}, "adapters"),
        ("/api/load", {"model": "/no/such/model"}, "/no/such/model"),
        ("/api/files", {"folder": "/no/such/folder/x"}, "/no/such/folder"),
        ("/api/write", {"fields": {"format": "merge", "model": BASE}}, "adapter"),
        ("/api/write", {"fields": {"format": "merge", "model": BASE, "adapter": "a", "output": BASE}}, BASE),
        ("/api/write", {"fields": {"format": "zip", "model": BASE, "output": "o"}}, "page"),
    ],
)
def test_mistakes_name_their_place(page, path, content, where):
    answer = page.post(path, **content)
    assert answer.status_code == 400 and answer.json()["where"] == where, answer.text


def made_runs(folder):
    """A root with a run that has no record, and one that was stopped and moved."""
    (folder / "old").mkdir(parents=True, exist_ok=True)
    write_rows(folder / "old" / "metrics.jsonl", [{"step": 3, "loss": 1.5}])
    record_of(folder / "moved", state="stopped", config={"output": str(folder / "before")})
    record_of(folder / "own", os.getpid())
    found = Runs(folder, Jobs(folder))
    found.refresh()
    return found


def studio_in(folder):
    made_runs(folder)
    return Studio(StudioConfig(root=str(folder)))


def stop_twice(folder):
    jobs = Jobs(folder)
    started = psutil.Process().create_time()
    jobs.stopping.add((os.getpid(), started))
    jobs.stop(os.getpid(), started)


FORM = {"model": BASE, "data": DATA}
WRONG = {  # what the page may send, or find
    "no model": lambda folder: prepare.Planner().plan({}, None, False),
    "no data": lambda folder: prepare.check_fields({"model": BASE}),
    "no memory": lambda folder: prepare.Planner().plan(FORM, "0GiB", False),
    "a context beyond the model's": lambda folder: prepare.Planner().plan(
        {**FORM, "max_seq_length": 1 << 20}, None, False
    ),
    "settings that are no YAML": lambda folder: prepare.parsed("r: [1"),
    "settings that are a list": lambda folder: prepare.parsed("- r"),
    "a folder that is not there": lambda folder: prepare.list_folder(str(folder / "a" / "b")),
    "an output outside the root": lambda folder: studio_in(folder).train({**FORM, "output": str(folder.parent)}),
    "an output with entries": lambda folder: studio_in(folder).train({**FORM, "output": str(folder / "old")}),
    "no object": lambda folder: fields_of({"fields": 3}),
    "no text": lambda folder: text_of({"run": 3}, "run"),
    "an unknown run": lambda folder: made_runs(folder).get("other"),
    "a run without a record": lambda folder: made_runs(folder).need_record("old"),
    "stop a run that does not run": lambda folder: made_runs(folder).stop("old"),
    "resume a run that runs": lambda folder: made_runs(folder).resume("own"),
    "resume a run that was moved": lambda folder: made_runs(folder).resume("moved"),
    "an unknown job": lambda folder: Jobs(folder).log("other"),
    "stop what has ended": lambda folder: Jobs(folder).stop(1, 1.0),
    "stop twice": stop_twice,
    "a model that is not there": lambda folder: load_service(
        str(folder / "none"), {"none": None}, StudioConfig(root=str(folder))
    ),
    "merge without an adapter": lambda folder: words_of({"format": "merge", "model": BASE}),
    "merge with another setting": lambda folder: words_of(
        {"format": "merge", "model": BASE, "adapter": "a", "output": "o", "r": 4}
    ),
    "an output that exists": lambda folder: words_of(
        {"format": "merge", "model": BASE, "adapter": "a", "output": str(folder)}
    ),
}


def use_wrong(folder, kind):
    """Do what the page's server refuses."""
    folder.mkdir(exist_ok=True)
    WRONG[kind](folder)


def messages():
    """The messages that the page has in Chinese, as patterns."""
    listed = re.findall(r'^  \["(.*)", "(.*)"\],$', (STATIC / "messages.js").read_text(encoding="utf-8"), re.MULTILINE)
    assert all(english.count("*") == chinese.count("*") for english, chinese in listed)
    assert all(re.search("[\u4e00-\u9fff]", chinese) for _, chinese in listed) and len(dict(listed)) == len(listed)
    return [re.compile(".*".join(map(re.escape, english.split("*"))), re.DOTALL) for english in dict(listed)]


@pytest.mark.parametrize("kind", WRONG)
def test_each_message_of_the_server_is_there_in_chinese(tmp_path, kind):
    with pytest.raises(UserError) as found:
        use_wrong(tmp_path / "root", kind)
    for text in (found.value.must, found.value.do):
        assert any(pattern.fullmatch(text) for pattern in messages()), text


def test_plan_and_counts_are_there_in_chinese():
    shown = set(prepare.preview({**FORM, "output": "-"})["counts"])
    planner = prepare.Planner()
    for device, memory, fields in (
        ("cpu", "8GiB", {}), ("cuda", "8GiB", {"per_device_train_batch_size": 8, "optim": "paged_adamw_8bit"}),
        ("cuda", "24GiB", {"compute_dtype": "float16"}), ("cpu", "1GiB", {"lora_dropout": 0.1}),
        ("cuda", "6GiB", {"max_seq_length": 4096}),
    ):  # fmt: skip
        found = planner.plan({"model": "llama-2-7b", "device": device, **fields}, memory, False)
        shown |= {term["name"] for term in found["terms"]} | set(found["choice"].split(", "))
    known = messages()
    assert not [text for text in shown if not any(pattern.fullmatch(text) for pattern in known)]


def test_yaml_wins_over_the_form(page):
    answer = page.post("/api/command", fields={"model": "m", "data": "d", "r": 16}, more="r: 4\nlora_alpha: 8").json()
    assert "--r=4" in answer["command"] and "--lora-alpha=8" in answer["command"]


def test_folders_show_models_adapters_and_data(page):
    found = {each["name"]: each["kind"] for each in page.post("/api/files", folder=str(DEMO)).json()["entries"]}
    assert found["base"] == "model" and found["data"] == "folder"
    data = page.post("/api/files", folder=str(DEMO / "data")).json()
    assert [each["name"] for each in data["entries"]] == ["heldout.jsonl", "train.jsonl"]
    assert data["parent"] == str(DEMO)


# ---- chat ----


def test_the_chat_answers_with_the_loaded_model(page):
    ask = {"model": "base", "messages": [{"role": "user", "content": "two mugs"}], "max_tokens": 4, "temperature": 0}
    assert page.post("/chat/v1/chat/completions", **ask).status_code == 409
    assert page.post("/api/load", model=BASE, adapters=[]).json()["models"] == ["base"]
    found = page.post("/chat/v1/chat/completions", **ask)
    assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] <= 4
    with page.client.stream("POST", "/chat/v1/chat/completions", json={**ask, "stream": True}) as stream:
        chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == found.json()["choices"][0]["message"]["content"]


# ---- a whole run ----


@pytest.mark.slow
def test_a_run_is_started_stopped_and_resumed(page):
    """From the page, with real processes. The page's server may end meanwhile: nothing of the run is in it."""
    output = page.studio.root / "real"
    fields = {"model": BASE, "data": DATA, "output": str(output), "max_steps": 60, "device": "cpu", "r": 4}
    assert page.post("/api/train", fields=fields).status_code == 200

    def row():
        return next((row for row in page.studio.state()["runs"] if row["name"] == "real"), {"state": None})

    assert row()["state"] == "starting"
    again = page.post("/api/train", fields=fields)
    until(lambda: row()["state"] == "running" and row()["step"] >= 2, 300)
    assert again.status_code in (200, 400)
    assert page.post("/api/stop", run="real").status_code == 200
    until(lambda: row()["state"] == "stopped", 300)
    stopped = row()["step"]
    assert 2 <= stopped < 60 and row()["can_resume"]
    assert page.post("/api/resume", run="real").status_code == 200
    until(lambda: row()["state"] == "finished", 600)
    assert row()["step"] == 60 and row()["has_report"] and row()["has_adapter"]
    log = page.client.get("/api/log", params={"job": row()["job"]}).json()["text"]
    assert "adapter" in log
