"""One tiny model, text and finished run, made once; a copy of them for every row."""

import pytest
from arena import Arena, copy_world

import isingcut
from isingcut.testing.tiny import tiny_checkpoint
from shared import leave_speed_out, write_words


@pytest.fixture(scope="session")
def world(shared, finished):
    """What every arena is a copy of; made after the first run, which compiles what both need."""
    return shared.folder("world", _make_world)


def _make_world(base):
    (base / "home").mkdir(parents=True)
    (base / "home" / "diary.txt").write_text("mine\n", encoding="utf-8")
    write_words(base / "text.txt")
    tiny_checkpoint("llama", base / "model")
    with pytest.MonkeyPatch.context() as patch:
        leave_speed_out(patch.setattr)
        patch.chdir(base)
        isingcut.run(
            model="model",
            calibration="text.txt",
            out="run",
            remove=2,
            random_states=30,
            samples=3,
            length=16,
            rank_samples=3,
            report_samples=3,
            patch_tokens=1000,
            dtype="float32",
        )


@pytest.fixture
def arena(world, tmp_path, monkeypatch):
    """A place of its own for one row."""
    return Arena(copy_world(world, tmp_path / "here", monkeypatch))


@pytest.fixture
def smaller_bounds(monkeypatch):
    """The same bounds, reached sooner."""
    monkeypatch.setattr("isingcut.data.text_files.RECORD", 1 << 19)
    monkeypatch.setattr("isingcut.data.text_files.UNPACKED", 1 << 21)
