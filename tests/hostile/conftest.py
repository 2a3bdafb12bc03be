"""One tiny model, text and finished run, made once and copied for every row."""

import pytest
from arena import make_arena

import isingcut
from shared import OPTIONS, without_speed, write_words
from tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def world(shared, finished):
    """Folder that every arena copies; made after the first run, which compiles what both need."""
    return shared.folder("world", _make_world)


def _make_world(base):
    (base / "home").mkdir(parents=True)
    (base / "home/diary.txt").write_text("mine\n")
    write_words(base / "text.txt")
    tiny_checkpoint("llama", base / "model")
    with without_speed() as patch:
        patch.chdir(base)
        isingcut.run(
            model="model",
            calibration="text.txt",
            out="run",
            remove=2,
            **{k: v for k, v in OPTIONS.items() if k not in ("states", "batch_tokens")},
        )


@pytest.fixture
def arena(world, tmp_path, monkeypatch):
    """Arena of one row: the working folder, with HOME and the cache in it."""
    return make_arena(world, tmp_path, monkeypatch)


@pytest.fixture
def smaller_bounds(monkeypatch):
    """Lower the size limit of records, so that small files reach it."""
    monkeypatch.setattr("isingcut.data.text_files.RECORD", 1 << 19)
