"""Steps that damage files of a run folder and record them, as the folder's author could."""

import hashlib
import json

from run_files import baseline, healing, task
from shared import load_json, save_json, write_json

SOLVE = "solve {run} --remove 2 --overwrite"
REPORT = "report {run}"


def record(arena, name):
    """Record the file in run.json as if the run had written it."""
    if name == "run.json":
        return
    place = arena.run / "run.json"
    run = load_json(place)
    file = arena.run / name
    # Files in a folder belong to the folder's record.
    key = name.partition("/")[0]
    plain = file.is_file() and key == name
    made = {
        "stage": "any",
        "fingerprint": "0",
        "options": {},
        "done": True,
        "seconds": 0.0,
    }
    run.stages[key] = {
        **run.stages.get(key, made),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest() if plain else None,
    }
    save_json(place, run)


EXTRAS = {
    "baseline-sleb.json": ("baseline", lambda: baseline("sleb", [0, 1], 0.5)),
    "healed/healing.json": (
        "healing",
        lambda: healing([{"step": 1, "tokens": 64, "loss": 2.0}], [4, 5], 6),
    ),
    "benchmarks.json": (
        "benchmarks",
        lambda: {"rows": [task("piqa", 0.5, 0.4)], "engine": "lm_eval 0.4"},
    ),
}


def provide(arena, name):
    """Return the path of a file; write it first if it is one of `EXTRAS`."""
    if name in EXTRAS:
        kind, content = EXTRAS[name]
        (arena.run / name).parent.mkdir(exist_ok=True)
        write_json(arena.run / name, kind, content())
        record(arena, name)
    return arena.run / name


def rewritten(name, change):
    """Return a step that replaces the content of a file by ``change(bytes)``."""

    def prepare(arena):
        file = provide(arena, name)
        file.write_bytes(change(file.read_bytes()))
        record(arena, name)

    return prepare


def edited(name, *path, value=None, drop=False):
    """Return a step that changes one value of a JSON file, or removes it with ``drop``."""

    def change(content):
        document = json.loads(content)
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        if drop:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        return json.dumps(document).encode()

    return rewritten(name, change)


def replaced(name, make):
    """Return a step that replaces a file by the result of ``make(path)``, which is no file."""

    def prepare(arena):
        file = provide(arena, name)
        file.unlink()
        make(file)
        record(arena, name)

    return prepare
