"""Uploads to the hub, with a stub server in its place."""

import base64
import http.server
import json
import threading

import pytest

from isingcut.files.ownership import mark
from isingcut.runs import uploading
from shared import StageFileError, load_json, parametrize, refuses, save_json

# The hub ---------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The few addresses that an upload uses; requests are kept on the server object."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        status = 200
        answer = {}
        if self.headers.get("Authorization") != "Bearer hf_right":
            status = 401
            answer = {"error": "Invalid credentials in Authorization header"}
        elif self.path == "/api/repos/create":
            name = json.loads(body)
            full = f"{name['organization']}/{name['name']}"
            answer = {"url": f"{self.server.address}/{full}", "name": full, "id": "1"}
        elif "/preupload/" in self.path:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], **how} for f in files]}
        elif "/commit/" in self.path:
            url = f"{self.server.address}/me/cut/commit/abc"
            answer = {"commitUrl": url, "commitOid": "abc"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def cut(tmp_path):
    """A small folder like a cut checkpoint."""
    folder = tmp_path / "model"
    folder.mkdir()
    record = {"format": "isingcut-removal", "version": 1, "removed": [3, 4], "of": 6}
    save_json(folder / "isingcut.json", record)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\ntags:\n- isingcut\n---\n# a card\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def upload(cut, repository, hub, **options):
    _, files = uploading.prepare(cut, repository)
    return uploading.push(files, repository, endpoint=hub, **options)


def test_push_uploads_every_file_but_the_marker_with_the_card(hub, cut, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    sent = {p.name: p.read_bytes() for p in cut.iterdir()}
    mark(cut)
    assert set(uploading.prepare(cut, "me/cut")[1]) == set(sent)
    assert hub.seen == []
    assert upload(cut, "me/cut", hub.address, private=True) == f"{hub.address}/me/cut"
    created = next(json.loads(b) for p, _, b in hub.seen if p == "/api/repos/create")
    assert (created["organization"], created["name"]) == ("me", "cut")
    assert created.get("private", created.get("visibility") == "private")
    lines = next(b for p, _, b in hub.seen if "/commit/" in p).splitlines()
    header, *files = map(json.loads, lines)
    assert header["value"]["summary"] == "Blocks removed by isingcut"
    values = [f["value"] for f in files]
    assert sent == {v["path"]: base64.b64decode(v["content"]) for v in values}


@parametrize("token", ["hf_wrong", ""])
def test_without_a_valid_token_nothing_is_sent(hub, cut, monkeypatch, tmp_path, token):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none")
    )
    with refuses("hf auth login") as caught:
        upload(cut, "me/cut", hub.address)
    assert "hf_wrong" not in str(caught.value)
    assert not [p for p, *_ in hub.seen if "/commit/" in p]


@parametrize("name", ["me/cut/more", "me/ cut"])
def test_a_bad_repository_name_is_refused_without_the_hub(cut, name):
    with refuses("write owner/name"):
        uploading.prepare(cut, name)


def test_a_hub_out_of_reach_is_one_line(cut, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with refuses("run again"):
        upload(cut, "me/cut", "http://127.0.0.1:9")


def test_a_card_without_valid_metadata_is_refused(cut):
    (cut / "README.md").write_text("---\na: [\n---\n")
    with refuses("no model card"):
        uploading.prepare(cut, "me/cut")


def test_a_checkpoint_that_was_changed_is_not_pushed(cut):
    mark(cut)
    (cut / "model.safetensors").write_bytes(b"others!")
    with refuses("was changed after isingcut wrote it"):
        uploading.prepare(cut, "me/cut")


def test_only_a_checkpoint_of_ours_is_pushed(tmp_path):
    with refuses("does not exist", StageFileError):
        uploading.prepare(tmp_path, "me/cut")


def test_nothing_uploaded_names_a_folder_of_this_machine(cut, tmp_path):
    text = f"wiki=0.5,{tmp_path}/my texts/a.txt=0.5"
    healing = {
        "provenance": {
            "torch": "2",
            "command_line": f"isingcut heal {cut} --text {text}",
        },
        "options": {"text": text, "trainer": f'{{"deepspeed": "{tmp_path}/ds.json"}}'},
        "before": {"parts": {f"{tmp_path}/my texts/a.txt": {"kl": 1.0}}},
    }
    record = load_json(cut / "isingcut.json")
    record["model"] = {"name": f"{tmp_path}/my-model"}
    record["proof"] = {
        "inputs": "text only",
        "difference": 0.0,
        "remarks": [
            f"no image could be made (cannot load {tmp_path}/my model/a.json); 1/3 left"
        ],
    }
    config = {
        "_name_or_path": f"{tmp_path}/my-model",
        "pad_token": "/pad",
        "hidden_size": 8,
    }
    written = {
        "isingcut.json": record,
        "healing.json": healing,
        "config.json": config,
        "tokenizer_config.json": {"special_tokens_map_file": f"{tmp_path}/map.json"},
        "notes.json": {"mine": str(tmp_path)},
        "tokenizer.json": {"vocab": {"/tmp/": 1}},
    }
    for name, content in written.items():
        save_json(cut / name, content)
    (cut / "notes.txt").write_text(str(tmp_path))
    _, files = uploading.prepare(cut, "me/cut")
    sent = {k: f if isinstance(f, bytes) else f.read_bytes() for k, f in files.items()}
    assert set(files) == {*written, "README.md", "model.safetensors"} - {"notes.json"}
    for name, content in sent.items():
        assert tmp_path.name.encode() not in content, name
    found = uploading.read_records(files)
    record.proof["remarks"] = ["no image could be made (cannot load a.json); 1/3 left"]
    options = {"text": "50% wiki, 50% a.txt", "trainer": '{"deepspeed": "ds.json"}'}
    assert found == {
        "isingcut.json": {**record, "model": {"name": "my-model"}},
        "healing.json": {
            "provenance": {"torch": "2"},
            "options": options,
            "before": {"parts": {"a.txt": {"kl": 1.0}}},
        },
    }
    assert json.loads(sent["config.json"]) == config | {"_name_or_path": "my-model"}
    assert files["tokenizer.json"] == cut / "tokenizer.json"
