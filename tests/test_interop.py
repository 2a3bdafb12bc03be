"""States in and out of other tools, and the hub: a stub server stands in for it."""

import base64
import doctest
import http.server
import json
import threading

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from isingcut.errors import ArchitectureError, InputError, StageFileError
from isingcut.files.outputs import MARKER, mark
from isingcut.runs import block_lists, interop_hub, mergekit
from isingcut.testing.tiny import tiny_config
from tiny import tiny_checkpoint


def test_examples():
    for module, examples in ((block_lists, 2), (mergekit, 1)):
        found = doctest.testmod(module)
        assert (found.attempted, found.failed) == (examples, 0)


@pytest.mark.parametrize(
    "text",
    ["3,4,9", "3 4 9", "3\n4\n9\n", "[3, 4, 9]", "(9; 4; 3)", '["3", "4", 9]', "9\t3-4",
     '{"removed": [9, 3, 4]}', '{"chosen": {"removed": [3, 4, 9]}, "kl": 1}',
     "# the middle\n3, 4   # two\n9"],
)  # fmt: skip
def test_lists_of_blocks_in_any_spelling(text):
    assert block_lists.parse_blocks(text) == [3, 4, 9]


@pytest.mark.parametrize(
    "text", ["", "none", "3,x", "-3", "3.5", "[3, true]", "[[3]]", '{"kept": [1]}', "8-5", "{}"]
)
def test_what_is_no_list_of_blocks_is_refused(text):
    with pytest.raises(InputError, match="block"):
        block_lists.parse_blocks(text)


def test_numbering_from_one(tmp_path, monkeypatch):
    file = tmp_path / "paper.txt"
    file.write_text("4, 5, 10")
    assert block_lists.read_blocks(f"@{file}", one_based=True).of(10) == [3, 4, 9]
    with pytest.raises(InputError, match=r"numbered 0 to 9, got 10; .*--one-based"):
        block_lists.read_blocks(f"@{file}").of(10)
    with pytest.raises(InputError, match=r"numbered 1 to 10, got 0; .*leave --one-based"):
        block_lists.read_blocks("0,1", one_based=True).of(10)
    with pytest.raises(InputError, match=r"numbered 0 to 9, got 11, 12$"):
        block_lists.read_blocks("11,12").of(10)
    with pytest.raises(InputError, match=r"got 10, 11, 12, 13, 14, 15, 16, 17, \.\.\.$"):
        block_lists.read_blocks("10-9999").of(10)
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("3\n4\n"))
    assert block_lists.read_blocks("-").of(10) == [3, 4]
    with pytest.raises(InputError, match="is not there"):
        block_lists.read_blocks(f"@{tmp_path / 'nothing'}")


def test_a_mergekit_recipe_stacks_the_kept_blocks(tmp_path):
    removed = [0, 3, 4]
    recipe = yaml.safe_load(mergekit.mergekit_recipe("me/model", 6, removed, "float32"))
    assert recipe["merge_method"] == "passthrough"
    sources = [part["sources"] for part in recipe["slices"]]
    assert all(len(s) == 1 and s[0]["model"] == "me/model" for s in sources)
    # What mergekit does with it: the ranges, end exclusive, one after the other.
    kept = [b for s in sources for b in range(*s[0]["layer_range"])]
    assert kept == [1, 2, 5]
    original = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama", tmp_path / "m"))
    layers = original.model.layers
    stacked = torch.nn.ModuleList([layers[b] for b in kept])
    from isingcut.models.cutting.checkpoint import excise

    excise(tmp_path / "m", removed, tmp_path / "cut")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    for ours, theirs in zip(cut.model.layers, stacked, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("family", "removed", "fields"),
    [
        ("llama", [1, 2], []),
        ("gpt2", [1, 2], []),
        ("phi3", [1, 2], []),
        ("gemma3", [1], ["layer_types"]),
        ("qwen2_moe", [2, 3], ["layer_types", "mlp_only_layers"]),
    ],
)
@pytest.mark.parametrize("written_out", [True, False])
def test_what_mergekit_would_leave_wrong_is_named(family, removed, fields, written_out):
    config = json.loads(tiny_config(family).to_json_string(use_diff=False))
    if not written_out:
        config.pop("layer_types", None)
    found = mergekit.mergekit_differs(config, removed)
    assert set(fields) <= set(found)
    assert bool(fields) == bool(found)
    with pytest.raises(ArchitectureError):
        mergekit.mergekit_differs(config, [99])


# The hub ---------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """The few addresses an upload uses; what it was sent is kept on the server object."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        status, answer = 200, {}
        if self.headers.get("Authorization") != "Bearer hf_right":
            status, answer = 401, {"error": "Invalid credentials in Authorization header"}
        elif self.path == "/api/repos/create":
            name = json.loads(body)
            full = f"{name['organization']}/{name['name']}"
            answer = {"url": f"{self.server.address}/{full}", "name": full, "id": "1"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in files
                ]
            }
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{self.server.address}/me/cut/commit/abc", "commitOid": "abc"}
        self.reply(status, answer)

    def do_GET(self):
        self.server.seen.append((self.path, self.headers.get("Authorization"), b""))
        known = self.headers.get("Authorization") == "Bearer hf_right"
        answer = {"sha": "0", "siblings": [], "id": "me/cut", "name": "me"}
        self.reply(200 if known else 401, answer if known else {"error": "Invalid credentials"})

    def reply(self, status, answer):
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
    (folder / "isingcut.json").write_text(json.dumps(record))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\ntags:\n- isingcut\n---\n# a card\n")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_push_uploads_every_file_with_the_card(hub, cut, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    url = interop_hub.push(cut, "me/cut", private=True, endpoint=hub.address)
    assert url == f"{hub.address}/me/cut"
    created = next(json.loads(b) for p, _, b in hub.seen if p == "/api/repos/create")
    assert (created["organization"], created["name"]) == ("me", "cut")
    assert created.get("private", created.get("visibility") == "private")
    lines = next(b for p, _, b in hub.seen if "/commit/" in p).splitlines()
    header, *files = [json.loads(line) for line in lines]
    assert header["value"]["summary"] == "2 of 6 blocks removed by isingcut"
    sent = {f["value"]["path"]: base64.b64decode(f["value"]["content"]) for f in files}
    assert sent == {p.name: p.read_bytes() for p in cut.iterdir()}


def test_the_marker_of_this_machine_stays_here(hub, cut, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    mark(cut)
    named = {f["name"]: f["bytes"] for f in interop_hub.listing(cut, "me/cut")}
    assert hub.seen == []
    assert named == {p.name: p.stat().st_size for p in cut.iterdir() if p.name != MARKER}
    interop_hub.push(cut, "me/cut", endpoint=hub.address)
    lines = next(b for p, _, b in hub.seen if "/commit/" in p).splitlines()[1:]
    assert {json.loads(line)["value"]["path"] for line in lines} == set(named)


def test_a_refused_token_says_how_to_log_in(hub, cut, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="hf auth login") as caught:
        interop_hub.push(cut, "me/cut", endpoint=hub.address)
    assert "hf_wrong" not in str(caught.value)


def test_without_a_token_nothing_is_sent(hub, cut, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="hf auth login"):
        interop_hub.push(cut, "me/cut", endpoint=hub.address)
    assert not [p for p, *_ in hub.seen if "/commit/" in p]


@pytest.mark.parametrize("name", ["cut", "me/cut/more", "me/ cut"])
def test_a_bad_repository_name_is_refused(hub, cut, monkeypatch, name):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(InputError, match="owner/name"):
        interop_hub.push(cut, name, endpoint=hub.address)
    assert hub.seen == []


def test_a_hub_out_of_reach_is_one_line(cut, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with pytest.raises(InputError, match="run again"):
        interop_hub.push(cut, "me/cut", endpoint="http://127.0.0.1:9")


def test_only_a_checkpoint_of_ours_is_pushed(tmp_path):
    with pytest.raises(StageFileError, match="isingcut excise"):
        interop_hub.push(tmp_path, "me/cut")
