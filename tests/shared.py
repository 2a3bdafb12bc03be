"""Data that many tests only read, made once per session, and what most tests import."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from isingcut.errors import (
    ArchitectureError,
    BusyError,
    CalibrationError,
    CheckpointError,
    FitError,
    InfeasibleError,
    InputError,
    IsingcutError,
    MemoryExhaustedError,
    ModelError,
    OutputExistsError,
    StageFileError,
    UnknownNameError,
    VerificationError,
)
from isingcut.files.results import read_document, write_json
from isingcut.options.config import RunConfig
from isingcut.options.heal import HealConfig

# Options of a run on a tiny model that takes a few seconds.
OPTIONS = {
    "samples": 3,
    "length": 16,
    "rank_samples": 3,
    "report_samples": 3,
    "random_states": 30,
    "states": 5,
    "dtype": "float32",
    "batch_tokens": 64,
    # Tuning a patch on all of the text would take longer than the rest.
    "patch_tokens": 1000,
    # The default text is read from the disk for each patch.
    "patch_share": 0,
}

parametrize = pytest.mark.parametrize
module_fixture = pytest.fixture(scope="module")


def call(*arguments):
    """Run the command line in this process and return its exit code."""
    from isingcut.cli import main as cli

    before = sys.argv
    sys.argv = ["isingcut", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as e:
        return int(e.code or 0)
    finally:
        sys.argv = before
    return 0


def works(*arguments):
    """Run a command that must end well."""
    assert call(*arguments) == 0


def run_tiny(model, text, out, **changes):
    """Do a whole run with `OPTIONS`, and others; return its folder."""
    import isingcut

    options = {**OPTIONS, "model": model, "calibration": text, "out": out, **changes}
    return isingcut.run(**options)


@contextlib.contextmanager
def without_speed():
    """Measure no speed and memory, as `leave_speed_out` says."""
    with pytest.MonkeyPatch.context() as patch:
        leave_speed_out(patch.setattr)
        yield patch


def flags(options):
    """Return options as words of a command line; the model is a word without a name."""
    return [
        str(value) if name == "model" else f"--{name.replace('_', '-')}={value}"
        for name, value in options.items()
    ]


def cells(table):
    """Return the cells of each line of a text, which are separated by ``::``."""
    lines = table.strip().splitlines()
    return [[cell.strip() for cell in line.split("::")] for line in lines]


class Bars:
    """A progress that keeps the totals of its bars and the steps done, by description."""

    def __init__(self):
        self.totals = {}
        self.done = {}

    @contextlib.contextmanager
    def __call__(self, description, total):
        self.totals[description] = total
        self.done[description] = 0.0

        def advance(steps=1, note=""):
            self.done[description] += steps

        yield SimpleNamespace(advance=advance)


class Shared:
    """Folders by name below ``root``, each made by the first process that requests it.

    No test may write to them: `check` reports folders that changed.
    """

    def __init__(self, root):
        self._root = root
        self._used = set()

    def folder(self, name, make):
        """Return the folder of that name; if missing, ``make`` creates it at the given path."""
        place = self._root / name
        record = self._root / f"{name}.made"
        with (self._root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not record.exists():
                make(place)
                record.write_text(json.dumps(snapshot(place)))
        self._used.add(name)
        return place

    def checkpoint(self, family="llama", **changes):
        """Return a tiny checkpoint of a family."""
        from isingcut.testing.tiny import tiny_checkpoint

        named = "-".join([family, *(f"{k}={v}" for k, v in changes.items())])
        return self.folder(
            named, lambda place: tiny_checkpoint(family, place, **changes)
        )

    def check(self):
        """Fail if a test has changed a shared folder."""
        for name in sorted(self._used):
            made = load_json(self._root / f"{name}.made")
            assert snapshot(self._root / name) == made, (
                f"a test changed the shared {name}"
            )


def snapshot(folder):
    """Return every file (by its hash), link and folder below ``folder``, by relative path."""
    entries = {}
    for path in folder.rglob("*"):
        key = path.relative_to(folder).as_posix()
        if path.is_symlink():
            entries[key] = f"-> {os.readlink(path)}"
        elif path.is_dir():
            entries[key] = "folder"
        elif path.is_file():
            entries[key] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            entries[key] = "special"
    return entries


def write_words(path, words=900):
    """Write a text of random six-letter words, enough for the splits of a tiny run."""
    path.parent.mkdir(exist_ok=True)
    letters = np.random.default_rng(0).choice(
        list("abcdefghijklmnopqrstuvwxyz"), (words, 6)
    )
    path.write_text(" ".join("".join(word) for word in letters))
    return path


def refuses(words, kind=InputError):
    """Expect an error of this kind whose message has these words, a regular expression."""
    return pytest.raises(kind, match=words)


class Document(dict):
    """A JSON object whose entries are attributes as well."""

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


def parse_json(text):
    """Return the content of a JSON text, with a `Document` for each object."""
    return json.loads(text, object_hook=Document)


def load_json(path):
    """Return the content of a JSON file of any format, as `parse_json` does."""
    return parse_json(path.read_text())


def save_json(path, content):
    """Write a JSON file, of any format."""
    path.write_text(json.dumps(content))


def write_jsonl(path, records):
    """Write each record on a line of its own; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def leave_speed_out(put):
    """Replace the speed and memory of evaluations by constants; ``put`` is a `setattr` by name.

    Block latencies are timed once instead of several times, and the sample text is short.
    """
    from isingcut.evaluation import speed

    names = ("prefill_tokens_per_second", "decode_tokens_per_second")
    rates = {f"{name}{end}": 1.0 for name in names for end in ("", "_se")}

    # `wraps` keeps the parameters of the replaced function, which a plan inspects.
    @functools.wraps(speed.speed)
    def unmeasured(models, *_, **__):
        return dict.fromkeys(models, rates)

    put("isingcut.evaluation.quality.speed", unmeasured)
    put("isingcut.models.replay.Replay.latency.__defaults__", (128, 1))
    put("isingcut.evaluation.prompts.NEW_TOKENS", 8)
