"""Fixtures: a tiny model, and a small data folder of random words."""

import json
import random
import tomllib

import pytest

from isingcut.testing.tiny import tiny_checkpoint

WORDS = "the cat sat on a mat rain fell over old stone town"


def words(seed, count):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS.split()) for _ in range(count))


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Return a tiny Llama of six blocks with a vocabulary of 262 tokens."""
    return tiny_checkpoint(
        "llama", tmp_path_factory.mktemp("model"), max_position_embeddings=512
    )


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Return a folder with file names of the data folder, filled with random words."""
    folder = tmp_path_factory.mktemp("data")

    def chat(k):
        return [
            {"role": "user", "content": words(2 * k, 5)},
            {"role": "assistant", "content": words(2 * k + 1, 9)},
        ]

    write(
        folder / "calib_instruct/mix1000.jsonl",
        [{"messages": chat(k)} for k in range(400)],
    )
    for i, name in enumerate(("wikitext2/test_raw", "calib_text/c4_300")):
        write(
            folder / f"{name}.jsonl",
            [{"text": words(99 * i + k, 60)} for k in range(12)],
        )
    write(
        folder / "gsm8k/train1000.jsonl",
        [{"context": words(k, 9), "solution": words(k + 50, 9)} for k in range(20)],
    )
    records = [
        {
            "context": words(q, 4),
            "choices": [words(10 * q + c, 1 + c) for c in range(4)],
            "answer": q % 4,
        }
        for q in range(6)
    ]
    write(folder / "arc_easy/test.jsonl", records)
    return folder


@pytest.fixture(scope="session")
def tiny(model, data):
    """Return options for a study that takes a few seconds."""
    return [
        f"--model={model}",
        f"--data={data}",
        "--dtype=float32",
        "--length=24",
        "--judged-tokens=96",
        "--batch-tokens=96",
    ]


@pytest.fixture
def install(request, tmp_path, monkeypatch):
    """Return a function that makes the plug-in of the test's folder found, as pip does."""
    text = (request.path.parent / "pyproject.toml").read_text()
    ((group, parts),) = tomllib.loads(text)["project"]["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {part}" for name, part in parts.items())]

    def write():
        place = tmp_path / "plug_in-0.1.dist-info"
        place.mkdir()
        (place / "METADATA").write_text("Name: plug-in\nVersion: 0.1")
        (place / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(tmp_path)

    return write
