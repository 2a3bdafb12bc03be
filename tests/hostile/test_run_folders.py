"""A run folder runs no code and belongs to its model and text; a broken plug-in is harmless."""

import json
import os
import shutil

import pytest
from arena import Row, parametrised
from damage import config, edited, exchange, other_model, written
from heal_rows import heal

import isingcut
from isingcut.energies import registry
from isingcut.files.journal import Journal
from isingcut.formats.sources import model_identity
from shared import cells, load_json, parametrize, refuses

OPTIONS = (
    "--remove 2 --calibration text.txt --length 16 --samples 3 --rank-samples 3 "
    "--report-samples 3"
)
PATCH = "--patch-tokens 1000 --patch-share 0"


def strangers_folder(arena):
    """Write a run folder whose model has its own code, and whose options trust that code."""
    classes = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
    }
    config(auto_map=classes, model_type="evil", architectures=["EvilModel"])(arena)
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

    edited("run/run.json", change)(arena)


COMMANDS = (
    "rank {run} --random-states 31 --overwrite",
    f"run {{model}} {OPTIONS} --random-states 30 {PATCH} --out {{run}}",
)
TRUST = [Row(c, c, "trust-remote-code|custom code", strangers_folder) for c in COMMANDS]


def moved_together(arena):
    place = arena.here / "moved"
    place.mkdir()
    for name in ("run", "model", "text.txt"):
        (arena.here / name).rename(place / name)
    os.chdir(arena.home)


def model_moved(arena):
    arena.model.rename(arena.home / "model-now")


def replaced_model(arena):
    other_model(arena)
    shutil.rmtree(arena.model)
    (arena.here / "other").rename(arena.model)


WORKS = {"code": 0, "makes": ("run/*", "moved/run/*")}
EXCISE = "excise {run} --blocks 0,1 --overwrite"
RANK = "rank {run} --random-states 31 --overwrite"
MOVED = "excise {here}/moved/run --blocks 0,1"
WENT = "is no longer at .*--model"
FOUND = [
    Row("rank from another folder", RANK, "", lambda a: os.chdir(a.home), **WORKS),
    Row("moved with its model", MOVED + " --overwrite", "", moved_together, **WORKS),
    Row("the model went away", EXCISE, WENT, model_moved),
    Row("it went away, the run goes on", f"run model {OPTIONS} --out run", WENT, model_moved),
    Row("and is named", EXCISE + " --model {home}/model-now", "", model_moved, **WORKS),
    Row("another is named", EXCISE + " --model {here}/other", "another version .*--model",
        other_model),
    Row("another took its place", EXCISE, "made with another version", replaced_model),
    Row("nothing is named", EXCISE + " --model {here}/nowhere", "no model at"),
]  # fmt: skip
vocabulary = edited("model/tokenizer.json", exchange)
template = written("model/chat_template.jinja", "{{ messages }}")
settings = config(rms_norm_eps=2e-6)
ends = written("model/generation_config.json", '{"eos_token_id": 3}')
NOTES = {"code": 0, "makes": ("run/*",)}
CHANGED = [
    ("vocabulary, run", f"run model {OPTIONS} --random-states 30 {PATCH} --out run",
        "another model .*different: tokenizer.json", vocabulary, {}),
    ("vocabulary, evaluate", "evaluate run --overwrite", "different: tokenizer", vocabulary, {}),
    ("vocabulary, heal", heal(), "another model .*different: tokenizer.json", vocabulary, {}),
    ("vocabulary, report", "report run", "changed since .*: tokenizer.json", vocabulary, NOTES),
    ("template, rank", RANK, "different: chat_template.jinja", template, {}),
    ("template, energy", f"energy model {OPTIONS} --out run --overwrite",
        "different: chat_template.jinja.*made again", template, NOTES),
    ("config, excise", EXCISE, "different: config.json", settings, {}),
    ("config, solve", "solve run --remove 3", "changed since .*: config.json", settings, NOTES),
    ("end token, solve", "solve run", "different: generation_config.json", ends, NOTES),
]  # fmt: skip
ROWS = [*TRUST, *FOUND, *(Row(*row, **more) for *row, more in CHANGED)]


@parametrised(ROWS)
def test_a_run_folder_is_only_data(arena, row):
    arena.try_row(row)
    assert not (arena.home / "pwned").exists()


def test_trust_is_stored_nowhere(arena):
    arena.works(f"energy model {OPTIONS} --out e --trust-remote-code", "e*", "home*")
    run = load_json(arena.here / "e/run.json")
    assert "trust_remote_code" not in json.dumps({**run, "provenance": 0})
    assert not isingcut.open_run("e").config.trust_remote_code
    assert isingcut.open_run("e", trust_remote_code=True).config.trust_remote_code


def test_what_auto_once_chose_stays(arena, stub):
    energy = f"energy model {OPTIONS} --out e"
    kept = []
    for dtype in ("bfloat16", "float32"):
        stub("isingcut.models.device.dtype_name", dtype)
        arena.works(energy, "e*", "home*")
        kept.append(isingcut.open_run("e").hamiltonian.meta)
    assert kept[0] == kept[1]
    arena.refuses(f"{energy} --dtype float32", "dtype")


MEASURED = (
    "--calibration text.txt --length 16 --samples 3 --rank-samples 3 --report-samples 3 "
    "--dtype float32"
)


def back_but_changed(arena):
    """Restore the text at its old length, with upper and lower case exchanged."""
    arena.text.write_text((arena.here / "away").read_text().swapcase())


def test_a_text_that_was_changed_is_not_read_on(arena):
    calibration = arena.run / "calibration.safetensors"
    measured = calibration.read_bytes()
    run = f"run model --remove 2 {MEASURED} --random-states 30 {PATCH} --out run"
    arena.works(run, "run/*", prepare=lambda a: a.text.rename(a.here / "away"))
    arena.refuses(
        run,
        "text.txt was changed since it was measured on; restore the old text",
        back_but_changed,
    )
    # The text is not named here, so the patch is fitted on the stored tokens, as without the text.
    arena.works(f"excise run --blocks 2,3 --overwrite {PATCH}", "run/*")
    fitted = load_json(arena.run / "model/isingcut.json").patch.text
    assert fitted.samples == fitted.searched
    assert fitted.short.startswith("the source was changed or cannot be read; restore")
    assert calibration.read_bytes() == measured
    arena.works(f"energy model --remove 2 {MEASURED} --out run --overwrite", "run/*")
    assert calibration.read_bytes() != measured


def overwritten(path):
    """Overwrite a weight in the middle; size and header stay the same."""
    with path.open("r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        f.write(b"\0\0\0\0")


@parametrize(
    "command, result",
    [
        (f"energy model {MEASURED} --out new", "new/hamiltonian.safetensors"),
        ("rank run --overwrite --random-states 31", "run/candidates.json"),
    ],
)
def test_weights_that_are_overwritten_while_they_are_measured(
    arena, monkeypatch, command, result
):
    put = Journal.put

    def late(journal, rows):
        overwritten(arena.model / "model.safetensors")
        put(journal, rows)

    monkeypatch.setattr(Journal, "put", late)
    line = "the model in .*model changed while it was read"
    made = ("new*", "run/*", "model/model.safetensors")
    arena.refuses(command, line, makes=made)
    file = arena.here / result
    assert not file.exists()
    assert not list(file.parent.glob("*.journal*"))
    stages = load_json(file.with_name("run.json")).stages
    assert not (stages.get(file.name) or {}).get("done")


@parametrize("place", ["model", "run/model"])
def test_weights_that_are_overwritten_while_they_are_healed(arena, monkeypatch, place):
    from isingcut.healing.training.train import Watch

    end = Watch.on_step_end

    def late(watch, *arguments, **rest):
        overwritten(arena.here / place / "model.safetensors")
        end(watch, *arguments, **rest)

    monkeypatch.setattr(Watch, "on_step_end", late)
    line = f"the model in .*/{place} changed while it was read"
    arena.refuses(heal(), line, makes=(f"{place}/model.safetensors",))


ROOMS = ("energies", "solvers", "baselines", "repairs")
# Name :: content of the plug-in :: expected error.
CONTENTS = """
raises :: 1 / 0 :: ZeroDivisionError: division by zero
ends :: raise SystemExit('bye') :: SystemExit: bye
imports :: import zorp_zorp :: ModuleNotFoundError: No module named 'zorp_zorp'
empty :: :: AttributeError: .*no attribute 'Part'
"""
NAMES = [name for name, _, _ in cells(CONTENTS)]
BLAMED = (
    r"'{name}' comes from the plug-in their-parts, which cannot be imported \({words}"
)


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """An installed package with broken entry points in every group."""
    metadata = tmp_path / "their_parts-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: their-parts\nVersion: 1.0\n")
    for name, content, _ in cells(CONTENTS):
        (tmp_path / f"theirs_{name}.py").write_text(content)
    parts = "\n".join(f"{name} = theirs_{name}:Part" for name in NAMES)
    groups = "\n".join(f"[isingcut.{room}]\n{parts}" for room in ROOMS)
    (metadata / "entry_points.txt").write_text(groups)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("plugins")
@parametrize("name, content, words", cells(CONTENTS))
def test_a_broken_plugin_that_is_named_is_blamed(arena, name, content, words):
    line = BLAMED.format(name=name, words=words)
    arena.refuses(f"solve {{run}} --solver {name}", line)
    run = "run {model} --remove 2 --calibration {text} --out {here}/new"
    arena.refuses(f"{run} --energy {name}", line)
    with refuses(line):
        registry.get(name)


@pytest.mark.usefixtures("plugins")
def test_a_broken_plugin_that_nobody_named_harms_nothing(arena):
    found = json.loads(arena.works("ls --json"))
    assert all({*NAMES} <= {*found[room]} for room in ROOMS)
    arena.works("solve {run} --remove 3", "run/*")
    options = f"{OPTIONS} --random-states 30 --dtype float32 {PATCH}"
    arena.works(f"run model {options} --out run", "run/*")
