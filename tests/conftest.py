"""One thread per process, and fixtures that many tests share.

Tiny models are slower with two threads, and several processes with two spinning threads each slow
one another tenfold. The variable is set here and not in a command, before torch is imported
anywhere, so that subprocesses inherit it.
"""

import gc
import itertools
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock, patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from shared import (
    Shared,
    call,
    leave_speed_out,
    parse_json,
    run_tiny,
    without_speed,
    works,
    write_words,
)


def pytest_collection_modifyitems(items):
    """Run the many short tests last, so that all worker processes end at about the same time."""
    items.sort(key=lambda item: "hostile" in item.path.parts)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Record the call sites of torch operations, see `benchmarks/sites.py`."""
    if "CARD_SITES" not in os.environ:
        return (yield)
    import sites

    with sites.record(path=item.path.name == sites.PATHS.name):
        return (yield)


imported = set()


def pytest_runtest_setup():
    """Freeze all objects after new imports: garbage collections, three per healing, skip them."""
    if len(sys.modules) not in imported:
        imported.add(len(sys.modules))
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _few_timings():
    """Time few steps of a few rounds where speed is measured by default."""
    from isingcut.evaluation.speed import speed

    timed = vars(speed)["__wrapped__"].__kwdefaults__
    with patch.dict(timed, new_tokens=4, repeats=3):
        yield


@pytest.fixture
def typed(capsys):
    """Function that runs a command that must end well, and returns what it printed."""

    def run(*arguments):
        capsys.readouterr()
        works(*arguments)
        return capsys.readouterr()

    return run


@pytest.fixture
def answer(typed):
    """Function that returns the JSON document of a command, all of its standard output."""
    return lambda *arguments: parse_json(typed(*arguments, "--json").out)


@pytest.fixture
def refusal(capsys):
    """Function that runs a command that must be refused, and returns its standard error."""

    def run(*arguments):
        capsys.readouterr()
        assert call(*arguments) == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def stub(monkeypatch):
    """Function that replaces a function, named as for `setattr`, by one with this result."""

    def replace(*given):
        *function, result = given
        monkeypatch.setattr(*function, lambda *_, **__: result)

    return replace


@pytest.fixture
def fails(monkeypatch):
    """Function that replaces a function, named as for `setattr`, by one that raises an error."""

    def replace(*given):
        *function, error = given
        monkeypatch.setattr(*function, Mock(side_effect=error))

    return replace


@pytest.fixture
def spy(monkeypatch):
    """Function that makes a function note each call, and returns the list of notes.

    A note is the result, or what ``note`` makes of the result and the arguments. Call number
    ``stop`` is interrupted by the user.
    """

    def watch(owner, name, note=lambda found, *given, **rest: found, stop=0):
        notes = []
        real = getattr(owner, name)
        calls = itertools.count(1)

        def watched(*given, **rest):
            if next(calls) == stop:
                raise KeyboardInterrupt
            found = real(*given, **rest)
            notes.append(note(found, *given, **rest))
            return found

        monkeypatch.setattr(owner, name, watched)
        return notes

    return watch


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Folders that all processes of the session share and no test may change."""
    base = tmp_path_factory.getbasetemp()
    # Under pytest-xdist each worker has a folder of its own below the session's.
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)
    made = Shared(root)
    yield made
    made.check()


@pytest.fixture(scope="session")
def llama(shared):
    """Checkpoint of a tiny llama: six blocks, 262 tokens."""
    return shared.checkpoint()


@pytest.fixture(scope="session")
def text(shared):
    """A plain text file with enough distinct words for all splits."""
    return (
        shared.folder("text", lambda place: write_words(place / "text.txt"))
        / "text.txt"
    )


@pytest.fixture(scope="session")
def finished(shared, llama, text):
    """Finished run that removed two blocks of the llama, with a second energy."""

    @without_speed()
    def make(place):
        run_tiny(llama, text, place, remove=2, compare_energies="empirical-fisher")

    return shared.folder("finished", make)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of the tiny models."""
    from isingcut.testing.tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def offline(monkeypatch):
    """Reach no hub."""
    for library in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{library}.HF_HUB_OFFLINE", True)


@pytest.fixture
def no_speed(monkeypatch):
    """Skip speed and memory, which take longer than a tiny run; other tests measure them."""
    leave_speed_out(monkeypatch.setattr)


@pytest.fixture
def one_layout(monkeypatch):
    """Multiply by the head's weight as it is stored, like streamed models. Models in memory
    transpose a small one first, and some CPUs then sum over the vocabulary in another order."""
    monkeypatch.setattr("isingcut.models.compute.head._TRANSPOSED_BYTES", 0)
