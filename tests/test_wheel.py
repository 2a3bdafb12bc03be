"""Wheel and sdist, installed where only the declared dependencies are: no extra is needed there."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import isingcut
from shared import module_fixture, parametrize, write_words
from tiny import tiny_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
OPTIONAL = ("dwave", "lm_eval", "matplotlib", "mkdocs")
DWAVE = "dimod:dwave.samplers.SimulatedAnnealingSampler"
PARTS = ("src", "tests", "benchmarks", "docs", "examples")


@module_fixture
def built(tmp_path_factory):
    """The folder with the sdist, and the wheel made from it, by the builders that pip runs."""
    base = tmp_path_factory.mktemp("build")
    given = {"directory": str(base / "dist"), "versions": ["standard"]}
    (sdist,) = SdistBuilder(str(ROOT)).build(**given)
    with tarfile.open(sdist) as archive:
        archive.extractall(base / "source", filter="data")
    (source,) = (base / "source").iterdir()
    assert list(WheelBuilder(str(source)).build(**given))
    return base / "dist"


def requirements(name, found):
    """Add every distribution that ``name`` needs without extras to ``found``."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires(name) or ():
        wanted = Requirement(text)
        key = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if key in found or (
            wanted.marker and not wanted.marker.evaluate({"extra": ""})
        ):
            continue
        found[key] = importlib.metadata.distribution(wanted.name)
        requirements(wanted.name, found)


@module_fixture
def clean(built, tmp_path_factory):
    """A fresh environment: the wheel, and links to its declared dependencies only."""
    folder = tmp_path_factory.mktemp("clean")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder / "env")
    python = folder / "env/bin/python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "env/lib" / version / "site-packages"
    found = {}
    requirements("isingcut", found)
    installed = Path(sysconfig.get_paths()["purelib"])
    for distribution in found.values():
        for top in {
            file.parts[0] for file in distribution.files or () if ".." not in file.parts
        }:
            if top != "__pycache__" and not (site / top).exists():
                (site / top).symlink_to(installed / top)
    (wheel,) = built.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
         "--disable-pip-version-check", "--quiet", wheel],
        check=True,
    )  # fmt: skip
    return python


def test_the_wheel_holds_the_package_and_its_data(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    expected = {
        str(p.relative_to(source))
        for pattern in ("*.py", "*.yaml", "*.jsonl", "templates/*")
        for p in (source / "isingcut").rglob(pattern)
    }
    assert expected | {"isingcut/py.typed"} <= names
    assert not [n for n in names if n.startswith("tests")]


def test_the_sdist_holds_what_a_checkout_holds(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    pages = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile"}
    assert pages | {"mkdocs.yml", "constraints.txt", "pyproject.toml"} <= names
    folders = {name.partition("/")[0] for name in names}
    assert set(PARTS) <= folders
    assert "studies" not in folders


def test_nothing_optional_is_there(clean):
    code = (
        "import importlib.util as u, sys\n"
        f"there = [n for n in {OPTIONAL!r} if u.find_spec(n)]\n"
        "import isingcut; print(there, isingcut.__file__, isingcut.__version__)\n"
        "assert 'torch' not in sys.modules"
    )
    options = {"capture_output": True, "text": True, "check": True}
    ended = subprocess.run([clean, "-I", "-c", code], **options)
    assert ended.stdout.startswith("[] ")
    assert "site-packages" in ended.stdout
    assert ended.stdout.strip().endswith(isingcut.__version__)
    command = [clean.parent / "isingcut", "--version"]
    assert isingcut.__version__ in subprocess.run(command, **options).stdout


TYPED = """
energy model --calibration text.txt --out run --samples 3 --length 16 --rank-samples 3
    --report-samples 3 --json
"""
ENERGY = tuple(TYPED.split())
INSPECT = ("inspect", "model", "--json")
SOLVE = ("solve", "run", "--remove", "3", "--solver", "exact", "--json")
MISSING = {
    "solvers": ("solve", "run", "--remove", "1", "--solver", DWAVE),
    "eval": ("evaluate", "run", "--tasks", "piqa"),
}
ONE_BY_ONE = """
import contextlib, io, json, sys
from isingcut.cli.main import main
answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    answers.append([arguments, code or 0, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


@module_fixture
def answers(clean, tmp_path_factory):
    """Results of commands in the clean environment, in one process, as torch imports slowly."""
    work = tmp_path_factory.mktemp("work")
    tiny_checkpoint("llama", work / "model")
    write_words(work / "text.txt")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    typed = json.dumps([ENERGY, INSPECT, SOLVE, *MISSING.values()])
    ended = subprocess.run(
        [clean, "-c", ONE_BY_ONE, typed],
        cwd=work,
        capture_output=True,
        text=True,
        env={**environment, "ISINGCUT_CACHE": str(work / "cache")},
    )
    assert ended.returncode == 0, ended.stderr
    return {tuple(words): rest for words, *rest in json.loads(ended.stdout)}


def test_energy_inspect_and_solve_need_no_extra(answers):
    assert all(answers[words][0] == 0 for words in (ENERGY, INSPECT, SOLVE)), answers
    measured, found, solved = (
        json.loads(answers[w][1]) for w in (ENERGY, INSPECT, SOLVE)
    )
    assert measured["blocks"] == len(found["blocks"]) == 6
    assert solved["removals"][0]["proven"] is True


@parametrize("extra", MISSING)
def test_a_missing_extra_is_named(answers, extra):
    code, _, said = answers[MISSING[extra]]
    assert code == 2, said
    assert f"pip install 'isingcut[{extra}]'" in said
    assert "Traceback" not in said
