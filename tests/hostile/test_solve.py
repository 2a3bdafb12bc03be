"""Third-party samplers: every failure ends in one line, and no file of the user changes."""

import json
import sys

import pytest
from arena import Row, parametrised
from damage import both, edited, written

from shared import cells, parametrize

HEAD = """
import sys
import dimod
import numpy as np

def states(bqm, value, vartype):
    names = list(bqm.variables)
    made = dimod.SampleSet.from_samples(
        (np.full((2, len(names)), value), names), vartype, energy=[0.0, 0.0]
    )
    return made

def found(samples, energy=0):
    return dimod.SampleSet.from_samples(samples, "BINARY", energy)

class Base(dimod.Sampler):
    properties, parameters = {}, {}
"""
FAILED = r"the sampler bad\.Bad failed: "
# Name :: what the sampler does :: expected line.
CALLS = r"""
a value error :: raise ValueError('two\nlines') :: bad\.Bad failed: ValueError: two lines$
an exit :: raise SystemExit(0) :: the sampler bad\.Bad failed: SystemExit: 0
markup :: raise RuntimeError('[/red] [bold') :: the sampler bad\.Bad failed: .*: \[/red\] \[bold
a lone surrogate :: raise RuntimeError('\ud800') :: the sampler bad\.Bad failed: RuntimeError
a long message :: raise RuntimeError('x' * 10**6) :: bad\.Bad failed: RuntimeError: x{300}$
nothing :: pass :: the sampler bad\.Bad failed: AttributeError: 'NoneType'
no samples :: return found([], []) :: the sampler bad\.Bad failed:
no rows :: return found((np.zeros((0, 99)), range(99)), []) :: no state that satisfies the const
other variables :: return found({'a': 1}) :: bad\.Bad failed: ValueError: unknown variable 0
values of 2 :: return states(bqm, 2, 'INTEGER') :: the sampler bad\.Bad returned .*not binary \(2\)
later :: return dimod.SampleSet.from_future(None, lambda _: 1 / 0) :: failed: ZeroDivisionError
"""
# Name :: the module :: expected line.
IMPORTS = r"""
an import that fails :: 1 / 0 :: importing 'bad' failed: ZeroDivisionError
an import that exits :: raise SystemExit(1) :: importing 'bad' failed: SystemExit: 1
an import of what is not there :: import nowhere :: importing 'bad' failed: .*'nowhere'
no Python :: def ( :: importing 'bad' failed: SyntaxError
"""
MODULES = {
    "a class of something else": (
        "class Bad:\n    def __init__(self): raise SystemExit",
        r"bad\.Bad is not a dimod sampler; expected a subclass of dimod\.Sampler",
    ),
    "an abstract class": (
        HEAD + "class Bad(dimod.Sampler): pass",
        FAILED + "TypeError: .*abstr",
    ),
    "a class that wants arguments": (
        HEAD
        + "class Bad(Base):\n    def __init__(self, token): pass\n    sample = None",
        FAILED + "TypeError: .*token",
    ),
    "parameters that fail": (
        HEAD
        + "class Bad(Base):\n    parameters = property(lambda self: 1 / 0)\n"
        + "    def sample(self, bqm): pass",
        FAILED + "ZeroDivisionError",
    ),
}
NAMES = r"""
dimod:os.system :: os\.system is not a dimod sampler
dimod:dimod.Nothing :: importing 'dimod' failed: .*no attribute 'Nothing'
dimod:Class :: write dimod:package.Class
dimod :: as a sampler; write dimod:package.Class
os.system :: unknown solver 'os.system'
"""
SOLVE = "solve {run} --remove 3 --solver "
BAD = SOLVE + "dimod:bad.Bad"


def module(text):
    return written("bad.py", text)


def method(body):
    return module(
        f"{HEAD}\nclass Bad(Base):\n    def sample(self, bqm):\n        {body}\n"
    )


ROWS = [
    *(Row(n, BAD, line, method(body)) for n, body, line in cells(CALLS)),
    *(Row(n, BAD, line, module(text)) for n, (text, line) in MODULES.items()),
    *(Row(n, BAD, line, module(text)) for n, text, line in cells(IMPORTS)),
    *(Row(f"the name {n}", f"{SOLVE}'{n}'", line) for n, line in cells(NAMES)),
    Row("run with a name", "run {model} --remove 2 --calibration {text} --length 16 "
        "--out {here}/new --solver dimod:os.system", "not a dimod sampler"),
    Row("a failed solve over a good one", "solve {run} --solver dimod:bad.Bad --overwrite",
        FAILED + "ValueError", method("raise ValueError")),
]  # fmt: skip


@pytest.fixture
def place(arena, monkeypatch):
    """An arena whose folder is on the module search path."""
    monkeypatch.syspath_prepend(arena.here)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "bad", raising=False)
    yield arena
    sys.modules.pop("bad", None)


@parametrised(ROWS)
def test_a_sampler_that_fails_is_one_line(place, row):
    place.try_row(row)


GOOD = {
    "prints": "print('{'); return dimod.ExactSolver().sample(bqm)",
    "gives spins": "return dimod.ExactSolver().sample(bqm).change_vartype('SPIN')",
    "breaks the count, which is repaired": "return states(bqm, 1, 'BINARY')",
}


@parametrize("name", GOOD)
def test_a_sampler_that_works_gives_clean_json(place, name):
    row = Row(name, "solve {run} --remove 3 --json --solver dimod:bad.Bad", code=0,
              prepare=method(GOOD[name]), makes=("run/*",))  # fmt: skip
    found = json.loads(place.try_row(row))
    assert {len(s["removed"]) for s in found["removals"][0]["states"]} == {3}


def asks(name):
    """Return a step that makes a run folder name a solver whose import leaves a file."""
    spring = module("from pathlib import Path\nPath('sprung').touch()\n")
    return both(
        spring, edited("run/run.json", lambda run: run["config"].update(solver=name))
    )


REMEMBERED = [
    Row(f"{name}: {command}", command, line, asks(name))
    for name, line in {
        "dimod:bad.Bad": "have --solver dimod:bad.Bad, which imports third-party code; .*type",
        "bad.Bad": "unknown solver 'bad.Bad'",
    }.items()
    for command in ("solve {run} --remove 3", "solve {run} --remove 2 --overwrite")
]
REPORTED = Row(
    "report", "report {run}", code=0, prepare=asks("bad.Bad"), makes=("run/report.*",)
)


@parametrised([*REMEMBERED, REPORTED])
def test_a_run_folder_chooses_no_code_to_import(place, row):
    place.try_row(row)


def test_a_run_folder_chooses_no_kernel(arena):
    # For an unknown name transformers would download code from the hub.
    kernel = edited(
        "run/run.json", lambda r: r["config"].update(attention="someone/kernel")
    )
    arena.refuses("rank {run}", "run.json: attention must be one of auto", kernel)
