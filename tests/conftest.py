"""One thread a process, and what many tests read made once.

Tiny models are slower with two threads, and processes that each spin on two slow each other
tenfold. Set here and not in a command, before torch is imported anywhere, so that subprocesses
have it too.
"""

import gc
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from shared import OPTIONS, Shared, leave_speed_out, write_words


def pytest_collection_modifyitems(items):
    """The many short tests last, so that the processes of the suite end together."""
    items.sort(key=lambda item: "hostile" in item.path.parts)


imported = set()


def pytest_runtest_setup():
    """Collections of garbage, of which a healing makes three, pass over what was imported."""
    if len(sys.modules) not in imported:
        imported.add(len(sys.modules))
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Folders that all processes of the session share and none may change."""
    base = tmp_path_factory.getbasetemp()
    # Under pytest-xdist each worker has a folder of its own below the session's.
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)
    made = Shared(root)
    yield made
    made.check()


@pytest.fixture(scope="session")
def llama(shared):
    """A tiny llama's checkpoint: six blocks, 262 tokens."""
    return shared.checkpoint()


@pytest.fixture(scope="session")
def text(shared):
    """A plain text file with enough distinct words for all splits."""
    return shared.folder("text", lambda place: write_words(place / "text.txt")) / "text.txt"


@pytest.fixture(scope="session")
def finished(shared, llama, text):
    """A finished run of two removals from the llama, with another energy beside its own."""

    def make(place):
        import isingcut

        with pytest.MonkeyPatch.context() as patch:
            leave_speed_out(patch.setattr)
            isingcut.run(
                model=str(llama),
                calibration=str(text),
                out=str(place),
                remove=2,
                also="empirical-fisher",
                **OPTIONS,
            )

    return shared.folder("finished", make)


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of the tiny models."""
    from isingcut.testing.tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def no_speed(monkeypatch):
    """Speed and memory take longer than the rest of a tiny run; tests of their own measure them."""
    leave_speed_out(monkeypatch.setattr)


@pytest.fixture
def one_layout(monkeypatch):
    """Models in memory multiply by the head's weight as it lies, as streamed ones do: a small one
    is turned round first, and some CPUs then add the vocabulary's terms in another order."""
    monkeypatch.setattr("isingcut.models.compute.head._TRANSPOSED_BYTES", 0)
