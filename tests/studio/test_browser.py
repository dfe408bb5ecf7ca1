"""Behaviour: the page in a real browser. Skipped without the extra `browser` and the system's Chromium.

Screenshots go to the folder that ONECARD_SCREENSHOTS names.
"""

import json
import os
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest

from onecard.cli import app as cli
from onecard.config import TrainConfig, make_config
from onecard.terminal import joined_flags
from tests.studio.test_page import BASE, DATA, Running, until
from tests.train.test_run_folders import record_of

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'onecard[browser]'")
axe_of = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install 'onecard[browser]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
STEPS = 100_000


def rows(count):
    for step in range(1, count + 1):
        loss = 1.2 + 2.5 / (1 + step / 5000) + (step * 7919 % 101) / 500
        row = {"step": step, "loss": loss, "learning_rate": 1e-4, "grad_norm": 0.5, "memory_bytes": 9,
               "supervised_tokens_per_second": 2000.0 + step % 7}  # fmt: skip
        yield json.dumps(row | ({"eval_loss": loss} if step % 5000 == 0 else {})) + "\n"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    made = Running(root=str(root))
    for i, (name, count) in enumerate((("long", STEPS), ("short", 900))):
        record_of(root / name, state="finished", began=100.0 + i, num_steps=count, config={"r": 8 * (i + 1)})
        (root / name / "metrics.jsonl").write_text("".join(rows(count)))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=[("light", 1280), ("dark", 390)], ids=["light-1280", "dark-390"])
def tab(request, browser, page):
    yield from opened(browser, page, *request.param)


@pytest.fixture
def wide(browser, page):
    yield from opened(browser, page, "light", 1280)


def opened(browser, page, scheme, width):
    """A tab in which an error of a script, or a request to another host, fails the test."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, wrong = context.new_page(), []
    tab.on(
        "console", lambda said: wrong.append(said.text) if said.type == "error" and " 400 " not in said.text else None
    )
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith((page.url, "data:")) else None)
    tab.set_default_timeout(60_000)
    yield tab
    context.close()
    assert not wrong, wrong


def shot(tab, name):
    if folder := os.environ.get("ONECARD_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        scheme = "dark" if tab.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else "light"
        width = tab.viewport_size["width"]
        tab.screenshot(path=Path(folder) / f"{name}-{scheme}-{width}.png", full_page=True)


def show(tab, page, view):
    tab.goto(f"{page.url}/#/{view}")
    tab.wait_for_selector(".view:not([hidden]) h1, .view:not([hidden]) .empty")


def fill(tab, output, **more):
    tab.fill("#model", BASE)
    tab.fill("#data", DATA)
    tab.fill("#output", str(output))
    for selector, value in more.items():
        tab.fill(selector, value)


def test_each_view_is_readable_by_all(tab, page):
    """axe finds nothing, no view is wider than its window, and all words are there in both languages."""
    axe = axe_of.Axe()
    for view in ("runs", "prepare", "chat", "export"):
        show(tab, page, view)
        if view == "runs":
            tab.wait_for_selector("canvas")
        if view == "prepare":
            fill(tab, page.studio.root / "new")
            tab.click("#look")
            tab.wait_for_selector(".tokens mark")
            tab.wait_for_selector(".terms")
        found = axe.run(tab).response["violations"]
        told = [(each["id"], node["html"][:160], node["any"][:1]) for each in found for node in each["nodes"]]
        assert not told, (view, told)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        shot(tab, view)
        tab.get_by_label("Language").select_option("zh")
        assert tab.evaluate("document.documentElement.lang") == "zh-CN"
        assert tab.locator("nav a").first.inner_text() == "训练"
        shot(tab, f"{view}-zh")
        tab.get_by_label("语言").select_option("en")


def test_the_keyboard_reaches_all(wide, page):
    show(wide, page, "runs")
    wide.keyboard.press("Tab")
    assert wide.evaluate("document.activeElement.className") == "skip"
    for _ in range(2):
        wide.keyboard.press("Tab")
    wide.keyboard.press("Tab")
    wide.keyboard.press("Enter")
    until(lambda: wide.url.endswith("#/chat"), 10)  # the links follow each other
    show(wide, page, "prepare")
    wide.fill("#model", BASE)
    wide.wait_for_selector(".terms")
    before = wide.inner_text(".verdict")
    wide.get_by_label("Rank").first.focus()
    wide.keyboard.press("ArrowRight")
    until(lambda: wide.inner_text(".verdict") != before, 20)
    until(lambda: "--r=32" in wide.inner_text(".copied pre >> nth=0"), 10)


def test_a_slider_s_plan_comes_within_200_ms(wide, page):
    """In the middle of several moves: the test machine is shared."""
    show(wide, page, "prepare")
    fill(wide, page.studio.root / "new")
    wide.wait_for_selector(".terms")
    times = []
    for r in range(20, 27):
        wide.locator("input[aria-label='Rank'][type=number]").fill(str(r))
        wide.wait_for_timeout(250)
        times.append(int(wide.inner_text("#plan-time")))
    assert sorted(times)[len(times) // 2] < 200, times


def test_a_run_of_100000_steps_is_drawn_within_a_second(wide, page):
    show(wide, page, "runs")
    wide.wait_for_selector("canvas")
    wide.get_by_label("Show short").uncheck()
    wide.wait_for_selector("canvas", state="detached")
    start = time.monotonic()
    wide.get_by_label("Show long").check()
    wide.wait_for_selector(".wide canvas")
    seconds = time.monotonic() - start
    assert "loss" in wide.get_by_role("img").first.get_attribute("aria-label").lower()
    print(f"drawn in {seconds:.2f} s")
    assert seconds < 2, "within 1 s on a quiet machine"
    wide.get_by_label("Show short").check()
    wide.wait_for_selector("text=Settings that differ")
    assert set(wide.locator(".differences tbody th code").all_inner_texts()) == {"r", "output"}


def test_a_mistake_is_shown_in_its_place(wide, page, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "robot", "content": "a"}]}\n')
    show(wide, page, "prepare")
    fill(wide, page.studio.root / "new")
    wide.fill("#data", str(path))
    wide.click("#look")
    wide.wait_for_selector(".fault")
    assert f"{path}:1" in wide.inner_text(".fault")


def test_the_command_to_copy_is_the_form(wide, page):
    show(wide, page, "prepare")
    fill(wide, page.studio.root / "new")
    wide.locator("input[aria-label='Rows a micro-batch']").fill("3")
    until(lambda: "batch-size=3" in wide.inner_text(".copied pre >> nth=0"), 20)

    words = shlex.split(wide.inner_text(".copied pre >> nth=0"))[1:]
    _, bound, _ = cli.parse_args(joined_flags(words), exit_on_error=False, print_error=False)
    config = make_config(
        TrainConfig, {k: v for k, v in bound.arguments["fields"].model_dump().items() if v is not None}
    )
    assert config.per_device_train_batch_size == 3 and config.model == BASE and config.data == [DATA]


def told_of_tokens(tab):
    """Under the pointer and with the arrow keys, each part of an answer tells the tokens that may stand there."""
    answer = tab.locator(".answer").first
    assert "".join(answer.locator(".token").all_text_contents()) == answer.text_content()
    answer.locator(".token").nth(1).hover()
    tip = tab.locator(".tip").first
    drawn, *likeliest = [float(share) for share in re.findall(r"([\d.]+) %", tip.inner_text())]
    assert len(likeliest) == 5 and likeliest == sorted(likeliest, reverse=True) and sum(likeliest) <= 100.6
    assert drawn == likeliest[0], "at temperature 0"
    answer.focus()
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".picked").count() == 1 and tip.is_visible()


@pytest.mark.slow
def test_prepare_start_watch_and_chat(wide, page):
    """The whole way on the embedded model, with real processes."""
    show(wide, page, "prepare")
    fill(wide, page.studio.root / "whole")
    wide.click(".prepare summary")
    wide.get_by_label("More settings, as YAML").fill("max_steps: 12\ndevice: cpu\nlearning_rate: 2.0e-3")
    wide.get_by_role("button", name="Start the run").click()
    wide.wait_for_url("**/#/runs")
    wide.wait_for_selector("tr.state-starting >> text=whole")
    wide.wait_for_selector("tr.state-finished >> text=whole", timeout=400_000)
    wide.wait_for_selector("canvas")
    shot(wide, "runs-whole")
    show(wide, page, "chat")
    wide.select_option("#tuned", "whole")
    wide.get_by_role("button", name="Load").click()
    wide.wait_for_selector("#message", timeout=120_000)
    wide.fill("#message", "two blue mugs to Bern")
    wide.get_by_role("button", name="Send").click()
    wide.wait_for_selector(".talks[aria-busy=false] .said.assistant >> nth=1", timeout=120_000)
    told_of_tokens(wide)
    shot(wide, "chat-whole")
    with wide.expect_download() as saved:
        wide.get_by_role("button", name="Save as JSONL").click()
    talks = [json.loads(line) for line in Path(saved.value.path()).read_text().splitlines()]
    assert len(talks) == 2 and all(len(talk["messages"]) == 2 for talk in talks)
    show(wide, page, "export")
    wide.select_option("#export-tuned", "whole")
    wide.fill("#export-output", str(page.studio.root / "merged"))
    wide.get_by_role("button", name="Start the export").click()
    wide.wait_for_selector("tr.state-finished >> text=merged", timeout=200_000)
    shot(wide, "export-whole")
    assert (page.studio.root / "merged" / "model.safetensors").is_file()
