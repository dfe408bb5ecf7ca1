"""Exact: four processes on two nodes, which are network namespaces with private addresses, make the adapter of four on
one. Each node has a torchrun of its own; they meet through its rendezvous."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import chat_rows, write_rows
from tests.forks import command_line, ranks
from tests.train.test_loop import adapter_bytes, fields

SCRIPT = Path(__file__).parent / "two_nodes.sh"


def have_namespaces():
    """Whether the system lets this user make a network namespace, and has the tools."""
    tools = all(map(shutil.which, ("unshare", "nsenter", "ip", "bash")))
    return tools and subprocess.run(["unshare", "-rn", "ip", "link"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not have_namespaces(), reason="no network namespaces, or no ip, unshare and nsenter")
def test_two_nodes_make_the_adapter_of_one(checkpoint, tmp_path):
    rows = write_rows(tmp_path / "d.jsonl", chat_rows(21))
    settings = fields(checkpoint, rows, tmp_path / "o", gradient_accumulation_steps=4, packing=False, parallel="fsdp")
    both = {where: tmp_path / where for where in ("two", "one")}
    for where, output in both.items():
        (tmp_path / f"{where}.yaml").write_text(yaml.safe_dump({**settings, "output": str(output)}))
    words = ["-m", "onecard", "train", "--config", tmp_path / "two.yaml"]
    done = subprocess.run(
        ["unshare", "-rn", "bash", SCRIPT, tmp_path, *words],
        env={**os.environ, "PYTHON": sys.executable},
        timeout=900,
    )
    logs = [(tmp_path / f"{node}.log").read_text() for node in ("first", "second")]
    assert done.returncode == 0, logs
    assert "6 updates of 4 x 1 rows" in "".join(logs)
    assert "| processes | 4, data parallel, the base sharded |" in (both["two"] / "report.md").read_text()
    (link,) = json.loads((tmp_path / "link.json").read_text())
    assert link["stats64"]["rx"]["bytes"] > 1 << 20, "they met over the link"
    for process in ranks(4, command_line, "train", "--config", tmp_path / "one.yaml"):
        end = process.wait(900)
        assert end.code == 0, end.err
    assert adapter_bytes(both["two"]) == adapter_bytes(both["one"])
