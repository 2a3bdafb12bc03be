"""Ways to damage the files of a run folder, as whoever made the folder could have."""

import hashlib
import json

from isingcut.files.results import write_json
from run_files import baseline, healing, task

SOLVE = "solve {run} --remove 2 --overwrite"
REPORT = "report {run}"


def record(arena, name):
    """Note in run.json that the file is as the run wrote it."""
    if name == "run.json":
        return
    place = arena.run / "run.json"
    run = json.loads(place.read_text(encoding="utf-8"))
    file = arena.run / name
    # What lies in a folder, or beside it, goes with the folder's record.
    key = {"healing.json": "healed"}.get(name, name.partition("/")[0])
    plain = file.is_file() and key == name
    made = {"stage": "any", "fingerprint": "0", "options": {}, "done": True, "seconds": 0.0}
    run["stages"][key] = {
        **run["stages"].get(key, made),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest() if plain else None,
    }
    place.write_text(json.dumps(run), encoding="utf-8")


EXTRAS = {
    "baseline-sleb.json": ("baseline", lambda: baseline("sleb", [0, 1], 0.5)),
    "healing.json": (
        "healing",
        lambda: healing([{"step": 1, "tokens": 64, "loss": 2.0}], [4, 5], 6),
    ),
    "benchmarks.json": (
        "benchmarks",
        lambda: {"rows": [task("piqa", 0.5, 0.4)], "engine": "lm_eval 0.4"},
    ),
}


def provide(arena, name):
    """The file, also where the small run did not come to write it."""
    if name in EXTRAS:
        kind, content = EXTRAS[name]
        write_json(arena.run / name, kind, content())
        record(arena, name)
    return arena.run / name


def rewritten(name, change):
    """Prepares an arena in which ``change(bytes)`` is the content of a file."""

    def prepare(arena):
        file = provide(arena, name)
        file.write_bytes(change(file.read_bytes()))
        record(arena, name)

    return prepare


def edited(name, *path, value=None, drop=False):
    """Prepares an arena in which one value of a JSON file is another."""

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
    """Prepares an arena in which something that is no file stands in its place."""

    def prepare(arena):
        file = provide(arena, name)
        file.unlink()
        make(file)
        record(arena, name)

    return prepare
