"""Behaviour: the upload, against a stand-in server of the hub's API; and the model card."""

import base64
import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard, constants

from onecard.adapter.origin import read_origin
from onecard.config import TrainConfig, make_config
from onecard.errors import UserError
from tests.train.test_loop import run

MORE = {
    "max_steps": 1,
    "validation_split": 0.2,
    "push_to_hub": True,
    "hub_model_id": "me/mugs",
    "hub_private_repo": True,
}


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits as the hub does, and keeps their files in memory."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created, self.stored, self.files, self.tokens = [], {}, {}, set()
        self.broken = False


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def reply(self, content, status=200):
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self):
        raw = self.body()
        self.server.stored[hashlib.sha256(raw).hexdigest()] = raw
        self.reply({})

    def do_POST(self):
        raw, hub, path = self.body(), self.server, self.path.split("?")[0]
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.broken:
            return self.reply({"error": "out of order"}, 403)
        if path == "/api/repos/create":
            hub.created.append(json.loads(raw))
            return self.reply({"url": f"{hub.url}/me/mugs", "id": "me/mugs", "name": "me/mugs"})
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith("safetensors")], "shouldIgnore": False}
                for f in json.loads(raw)["files"]
            ]
            return self.reply({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{hub.url}/put/{each['oid']}"}}}
                for each in json.loads(raw)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        assert path == "/api/models/me/mugs/commit/main", path
        for line in map(json.loads, raw.splitlines()):
            if line["key"] == "file":
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile":
                hub.files[line["value"]["path"]] = hub.stored[line["value"]["oid"]]
        return self.reply({"commitUrl": f"{hub.url}/me/mugs/commit/1", "commitOid": "1", "success": True})


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # what HF_ENDPOINT sets when the library is imported
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()


def test_the_adapter_and_its_card_are_uploaded(hub, checkpoint, chats, tmp_path):
    base = tmp_path / "Mug-1B"
    shutil.copytree(checkpoint, base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Mugs\n")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": "mugs/Mug-1B"}))
    result = run(base, chats, tmp_path / "secret" / "o", **MORE)
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "mugs")
    assert created.get("visibility") == "private" or created.get("private") is True  # by the client's release
    assert "Bearer hf_test" in hub.tokens
    assert hub.files == {path.name: path.read_bytes() for path in result.adapter.iterdir()}
    assert read_origin(result.adapter) is not None  # the card is no part of what the adapter computes
    card = ModelCard.load(result.adapter / "README.md")
    assert card.data.library_name == "peft" and card.data.license == "apache-2.0"
    assert card.data.base_model == "mugs/Mug-1B" and "base_model:adapter:mugs/Mug-1B" in card.data.tags
    for said in ("| eval_loss |", "| file | chats.jsonl |", "| learning_rate | 0.005 |", "| r | 4 |", "| seed | 42 |"):
        assert said in card.text, said
    assert str(tmp_path) not in card.content and "More Information Needed" not in card.content


def test_a_failed_upload_leaves_the_adapter_and_says_how(hub, checkpoint, chats, tmp_path):
    hub.broken = True
    output = tmp_path / "o"
    with pytest.raises(UserError) as error:
        run(checkpoint, chats, output, **MORE)
    assert f"hf upload me/mugs {output / 'adapter'} ." in str(error.value)
    for name in ("report.html", "adapter/adapter_model.safetensors", "adapter/README.md"):
        assert (output / name).is_file()
    hub.broken = False
    run(checkpoint, chats, output, resuming=True, **MORE)  # nothing is left to train
    assert hub.files["adapter_model.safetensors"] == (output / "adapter" / "adapter_model.safetensors").read_bytes()


def test_without_a_token_nothing_is_trained(checkpoint, chats, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="needs a token"):
        run(checkpoint, chats, tmp_path / "o", **MORE)
    assert not (tmp_path / "o").exists()


def test_a_card_without_a_known_base_names_none(checkpoint, chats, tmp_path):
    result = run(checkpoint, chats, tmp_path / "o", max_steps=1)
    card = ModelCard.load(result.adapter / "README.md")
    assert card.data.base_model is None and card.data.license is None and "not known" in card.text


@pytest.mark.parametrize(
    "more, said",
    [({"hub_model_id": "a/b"}, "need push_to_hub"), ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "ACCOUNT/NAME")],
)
def test_settings_that_cannot_hold_are_refused(more, said):
    with pytest.raises(UserError) as error:
        make_config(TrainConfig, {"model": "m", "data": "d", "output": "o", **more})
    assert said in str(error.value)
