"""A run folder runs no code, is found with its model wherever both went, and keeps its dtype."""

import json
import os
import shutil

import pytest
from arena import Row, call

import isingcut
from isingcut.files.writing import read_json, write_json
from isingcut.models.sources import model_identity

OPTIONS = (
    "--remove 2 --calibration text.txt --length 16 --samples 3 --rank-samples 3 --report-samples 3"
)


def edit_run(arena, change):
    """Change run.json as a stranger would, in form."""
    run = read_json(arena.run / "run.json", "run")
    change(run)
    content = {k: v for k, v in run.items() if k not in ("format", "version")}
    write_json(arena.run / "run.json", "run", content)


def strangers_folder(arena):
    """A run folder whose model brings code, and which says that the code is trusted."""
    config = json.loads((arena.model / "config.json").read_text(encoding="utf-8"))
    classes = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    config.update(auto_map=classes, model_type="evil", architectures=["EvilModel"])
    (arena.model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (arena.model / "evil.py").write_text(
        f"open({str(arena.home / 'pwned')!r}, 'w')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
        "class EvilModel(LlamaForCausalLM):\n    config_class = EvilConfig\n",
        encoding="utf-8",
    )

    def change(run):
        run["config"]["trust_remote_code"] = True
        run["provenance"]["model"]["sha256"] = model_identity(arena.model)["sha256"]

    edit_run(arena, change)


COMMANDS = (
    "rank {run} --random-states 31 --overwrite",
    "excise {run} --blocks 0,1 --overwrite",
    "evaluate {run} --overwrite",
    "baseline random {run}",
    f"run {{model}} {OPTIONS} --random-states 30 --out {{run}}",
)
TRUST = [
    Row(f"a folder that trusts itself: {c}", c, "trust-remote-code|custom code", strangers_folder)
    for c in COMMANDS
]


def chdir_home(arena):
    os.chdir(arena.home)


def moved_together(arena):
    place = arena.here / "moved"
    place.mkdir()
    for name in ("run", "model", "text.txt"):
        (arena.here / name).rename(place / name)
    os.chdir(arena.home)


def model_moved(arena):
    arena.model.rename(arena.home / "model-now")


def other_model(arena):
    shutil.copytree(arena.model, arena.here / "other")
    path = arena.here / "other" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "rms_norm_eps": 2e-6}), encoding="utf-8")


def replaced_model(arena):
    other_model(arena)
    shutil.rmtree(arena.model)
    (arena.here / "other").rename(arena.model)


WORKS = {"code": 0, "makes": ("run/*", "moved/run/*")}
EXCISE = "excise {run} --blocks 0,1 --overwrite"
RANK, MOVED = "rank {run} --random-states 31 --overwrite", "excise {here}/moved/run --blocks 0,1"
WENT = "is no longer at .*--model"
FOUND = [
    Row("from another folder", EXCISE, "", chdir_home, **WORKS),
    Row("rank from another folder", RANK, "", chdir_home, **WORKS),
    Row("moved with its model", MOVED + " --overwrite", "", moved_together, **WORKS),
    Row("the model went away", EXCISE, WENT, model_moved),
    Row("it went away, the run goes on", f"run model {OPTIONS} --out run", WENT, model_moved),
    Row("and is named", EXCISE + " --model {home}/model-now", "", model_moved, **WORKS),
    Row("another is named", EXCISE + " --model {here}/other", "another version .*--model",
        other_model),
    Row("another took its place", EXCISE, "made with another version", replaced_model),
    Row("nothing is named", EXCISE + " --model {here}/nowhere", "no model at"),
]  # fmt: skip
ROWS = [*TRUST, *FOUND]


@pytest.mark.parametrize("row", ROWS, ids=[r.name for r in ROWS])
def test_a_run_folder_is_only_data(arena, row):
    arena.try_row(row)
    assert not (arena.home / "pwned").exists()


def test_trust_is_stored_nowhere(arena):
    code, _, err = call(f"energy model {OPTIONS} --out e --trust-remote-code".split(), seconds=60)
    assert code == 0, err
    run = json.loads((arena.here / "e" / "run.json").read_text(encoding="utf-8"))
    assert "trust_remote_code" not in json.dumps({**run, "provenance": 0})
    assert not isingcut.open_run("e").config.trust_remote_code
    assert isingcut.open_run("e", trust_remote_code=True).config.trust_remote_code


def test_what_auto_once_chose_stays(arena, monkeypatch):
    words = f"energy model {OPTIONS} --out e".split()
    monkeypatch.setattr("isingcut.models.device.dtype_name", lambda *a: "bfloat16")
    assert call(words, seconds=60)[0] == 0
    meta = isingcut.open_run("e").hamiltonian.meta
    monkeypatch.setattr("isingcut.models.device.dtype_name", lambda *a: "float32")
    code, _, err = call(words, seconds=60)
    assert code == 0, err
    assert isingcut.open_run("e").hamiltonian.meta == meta
    code, _, err = call([*words, "--dtype", "float32"])
    assert code == 2
    assert "dtype" in err
