"""Exact: rows of a hub dataset over HTTP, from a stand-in server of the hub's API, streamed and downloaded."""

import hashlib
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest

from onecard.config import Source
from onecard.data.sources import hub_rows
from onecard.errors import UserError

SHA = "0123456789abcdef0123456789abcdef01234567"
ROWS = [{"text": f"row {number}"} for number in range(3000)]


class Hub(ThreadingHTTPServer):
    """Serves one dataset, org/tiny, as the hub does. `broken`: the name of a file that it refuses to send."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.ranges, self.broken = {}, [], ""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, raw, status=200, **headers):
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        if re.fullmatch(r"/api/datasets/org/tiny(/revision/\w+)?", path):
            siblings = [{"rfilename": name} for name in self.server.files]
            found = {"_id": "1", "id": "org/tiny", "sha": SHA, "private": False, "tags": [], "siblings": siblings}
            return self.reply(json.dumps(found).encode())
        if match := re.fullmatch(r"/api/datasets/org/tiny/tree/\w+(?:/(.*))?", path):
            return self.reply(json.dumps(self.listed(match[1])).encode())
        match = re.fullmatch(r"/datasets/org/tiny/resolve/\w+/(.*)", path)
        if match is None or match[1] not in self.server.files:
            code = "RepoNotFound" if match is None else "EntryNotFound"
            return self.reply(b'{"error": "not found"}', 404, X_Error_Code=code)
        if match[1] == self.server.broken and self.command == "GET":
            return self.reply(b'{"error": "out of order"}', 403)
        return self.send_file(self.server.files[match[1]])

    def listed(self, folder):
        """Return the entries of a folder, in the form of the hub's API."""
        start = f"{folder}/" if folder else ""
        inside = [name.removeprefix(start) for name in self.server.files if name.startswith(start)]
        files = [name for name in inside if "/" not in name]
        folders = sorted({name.split("/")[0] for name in inside if "/" in name})
        sizes = {name: len(self.server.files[start + name]) for name in files}
        return [{"type": "file", "path": start + name, "size": sizes[name], "oid": "1"} for name in files] + [
            {"type": "directory", "path": start + name, "oid": "2"} for name in folders
        ]

    def send_file(self, raw):
        more = {"Content_Type": "application/octet-stream", "X_Repo_Commit": SHA}
        more["ETag"] = f'"{hashlib.sha1(raw).hexdigest()}"'
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.reply(raw, **more)
        start, end = int(wanted[1]), min(int(wanted[2] or len(raw)), len(raw) - 1)
        self.server.ranges.append((start, end))
        return self.reply(raw[start : end + 1], 206, Content_Range=f"bytes {start}-{end}/{len(raw)}", **more)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants  # what HF_ENDPOINT and HF_HOME set when the libraries are imported
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    yield server
    server.shutdown()


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=500)
    return file.getvalue()


def test_rows_over_http(hub, tmp_path):
    hub.files = {"README.md": b"---\nlicense: mit\n---\n", "data/train-00000-of-00001.parquet": parquet(ROWS)}
    hub.files["data/test-00000-of-00001.parquet"] = parquet(ROWS[:3])
    tiny = Source(path="org/tiny")
    assert [row for _, row in hub_rows(tiny, streaming=True)] == ROWS and hub.ranges
    assert not list((tmp_path / "datasets").rglob("*.arrow"))  # a stream stores no rows
    assert list(hub_rows(tiny, streaming=False)) == list(enumerate(ROWS, 1))
    test = Source(path="org/tiny", split="test")
    assert [row for _, row in hub_rows(test, streaming=True)] == ROWS[:3]
    for source, said in ((Source(path="org/none"), "org/none"), (Source(path="org/tiny", split="dev"), "split: dev")):
        with pytest.raises(UserError, match=said):
            next(hub_rows(source, streaming=True))


def test_a_stream_that_breaks_is_no_end(hub):
    lines = [b"".join(json.dumps(row).encode() + b"\n" for row in part) for part in (ROWS[:1500], ROWS[1500:])]
    hub.files = {f"train-{number}.jsonl": raw for number, raw in enumerate(lines)}
    rows = hub_rows(Source(path="org/tiny"), streaming=True)
    assert next(rows) == (1, ROWS[0])
    hub.broken = "train-1.jsonl"
    with pytest.raises(UserError, match="to its end") as error:
        list(rows)
    assert "org/tiny:1024" in str(error.value)  # rows are read 1,024 at a time
