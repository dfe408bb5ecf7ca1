"""Behaviour: what users copy from README and docs runs as it is written; only the hub model is a small local one."""

import re
import shlex

import pytest

from tests.conftest import chat_rows, make_checkpoint, write_rows
from tests.snippets import ROOT, fenced, run

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMAND = """import sys
from onecard import cli
sys.argv = {words}
try:
    cli.main()
except SystemExit as ended:
    assert not ended.code, ended.code"""
PAGES = ["README.md", "README.zh-CN.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model under the hub's name, in which README's code has run, and then that of two pages."""
    folder = tmp_path_factory.mktemp("snippets")
    make_checkpoint(folder / HUB, max_position_embeddings=1024)
    make_checkpoint(folder / "MODEL", max_position_embeddings=1024)
    lines = "".join(fenced("README.md", "bash")).splitlines()
    blocks = fenced("README.md", "python") + [COMMAND.format(words=shlex.split(line)) for line in lines]
    blocks += fenced("docs/exporting.md", "python")
    other = "import os\nos.makedirs('api'); os.chdir('api'); os.symlink('../HuggingFaceTB', 'HuggingFaceTB')"
    write_rows(folder / "chats.jsonl", chat_rows(8))
    again = "import shutil\nshutil.copy('../chats.jsonl', '.')"
    (folder / "printed").write_text(run([*blocks, other, again, *fenced("docs/api.md", "python")[:1]], folder))
    return folder


def test_the_code_of_the_pages_runs(folder):
    assert "run/adapter" in (folder / "printed").read_text()
    for path in (
        "run/adapter/adapter_config.json",
        "run-2/report.html",
        "api/run/report.html",
        "api/merged/model.safetensors",
    ):
        assert (folder / path).is_file(), path


def test_both_readmes_have_the_same_code():
    for language in ("python", "bash"):
        assert fenced("README.md", language) == fenced("README.zh-CN.md", language) != []


def commands(page):
    """The lines of a page's fences that call onecard, as words."""
    text = "\n".join(fenced(page, "console") + fenced(page, "bash"))
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("onecard ")]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/commands.md"])
def test_commands_and_flags_of_the_pages_are_known(page):
    """docs/commands.md, which the code writes, has them."""
    sections = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8").split("\n## onecard ")
    known = {section.split()[0]: section for section in sections[1:]}
    for _, command, *words in commands(page):
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"`[^`]*{word.partition('=')[0]}\b", known[command]), (page, command, word)


def test_links_between_the_pages_lead_to_files():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), (page, target)


def test_the_messages_of_troubleshooting_are_the_code_s():
    source = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "onecard").rglob("*.py"))
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    first_cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    messages = [text for cell in first_cells for text in re.findall(r"`([^`]+)`", cell) if ".jsonl" not in text]
    assert len(messages) > 10
    for message in messages:
        for part in message.split("..."):
            assert part.strip() in source, message


def plan_rows():
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    return re.findall(r"^\| (\d+) GiB \| (\S+) \| ([\d.]+) \| (.+?) \| ([\d.]+) \| ([\d,]+) \|$", page, re.MULTILINE)


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] if number else []) for number, row in enumerate(plan_rows())]
)
def test_the_plans_of_the_memory_page_are_the_code_s(row):
    import onecard

    gib, model, total, choice, time, context = row
    found = onecard.plan(model, device_memory_bytes=int(gib) << 30, device="cuda", max_seq_length=2048)
    assert (f"{found.total_bytes / 2**30:.2f}", found.choice, f"{found.time:.2f}") == (total, choice, time)
    assert f"{found.largest_length:,}" == context


def test_the_chart_reads_the_results():
    from benchmarks.chart import panels

    page = (ROOT / "README.md").read_text(encoding="utf-8")
    for _, _, numbers in panels():
        for number in numbers:
            assert f"{number:,.0f}" in page
