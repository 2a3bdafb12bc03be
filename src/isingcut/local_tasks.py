"""Our task files and a data folder become tasks of lm-evaluation-harness."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.errors import InputError, UnknownNameError

_FOLDER = Path(__file__).parent / "tasks"


@dataclass(frozen=True, eq=False)
class LocalTask:
    """One of our task files with its questions.

    Attributes:
        name: of the file.
        metric: the harness's metric that is reported.
        configurations: harness configurations, one or one a subject, with `custom_dataset`.
        questions: how many there are in all.
    """

    name: str
    metric: str
    configurations: list[dict[str, Any]]
    questions: int


def names() -> list[str]:
    """All local tasks."""
    return sorted(p.stem for p in _FOLDER.glob("*.yaml"))


def read_task(name: str, data: Path, questions: int | None = None) -> LocalTask:
    """A local task over the questions in a data folder.

    Args:
        name: one of `names`.
        data: the folder with `arc_easy/test.jsonl` and so on.
        questions: at most so many. Where the folder has a fixed subset of that size or more
            (`test_sub500.jsonl`), they are taken from it, evenly spaced.

    Raises:
        UnknownNameError: no such task.
        InputError: its file is missing or damaged.
    """
    import yaml

    path = _FOLDER / f"{name}.yaml"
    if name not in names():
        raise UnknownNameError(f"unknown local task {name!r}; known: {', '.join(names())}")
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    own = config.pop("isingcut")
    asked = _questions(data, own["test"], questions)
    examples = records(_only(data, own["fewshot"])) if "fewshot" in own else []
    by = own.get("by")
    groups = [None] if by is None else list(dict.fromkeys(str(r[by]) for r in asked))
    configurations = []
    for group in groups:
        one = copy.deepcopy(config)
        if by is not None and group is not None:
            one["task"] = f"{config['task']}_{group}"
            one["description"] = config["description"].replace("{by}", group.replace("_", " "))
        chosen = [r for r in asked if by is None or str(r[by]) == group]
        shots = [r for r in examples if by is None or str(r[by]) == group]
        if len(shots) < int(one["num_fewshot"]):
            raise InputError(
                f"{data / own.get('fewshot', own['test'])}.jsonl has {len(shots)} examples"
                f"{f' about {group}' if group else ''}; {name} shows {one['num_fewshot']}"
            )
        one["custom_dataset"] = _dataset(chosen, shots)
        one["test_split"] = "test"
        if shots:
            one["fewshot_split"] = "fewshot"
        configurations.append(one)
    return LocalTask(name, str(own["metric"]), configurations, len(asked))


def _dataset(test: list[dict[str, Any]], fewshot: list[dict[str, Any]]) -> Any:
    def make(**ignored: Any) -> dict[str, Any]:
        import datasets

        found = {"test": datasets.Dataset.from_list(test)}
        if fewshot:
            found["fewshot"] = datasets.Dataset.from_list(fewshot)
        return found

    return make


def _only(data: Path, stem: str) -> Path:
    """`stem.jsonl`, or the one file whose name goes on with digits (`train1000.jsonl`)."""
    exact = data / f"{stem}.jsonl"
    if exact.is_file():
        return exact
    numbered = sorted(data.glob(f"{stem}[0-9]*.jsonl"))
    if len(numbered) != 1:
        raise InputError(f"there is no file {exact}; give the folder with the questions as --data")
    return numbered[0]


def _questions(data: Path, stem: str, most: int | None) -> list[dict[str, Any]]:
    subsets = {
        int(p.stem.rpartition("_sub")[2]): p
        for p in data.glob(f"{stem}_sub[0-9]*.jsonl")
        if p.stem.rpartition("_sub")[2].isdigit()
    }
    large = [size for size in sorted(subsets) if most is not None and size >= most]
    found = records(subsets[large[0]] if large else _only(data, stem))
    if most is None or len(found) <= most:
        return found
    picks = np.linspace(0, len(found) - 1, most).round().astype(int)
    return [found[i] for i in picks]


def records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file.

    Raises:
        InputError: missing, damaged or empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise InputError(f"{path} is not readable as JSON lines: {e}") from e
    if not found or not all(isinstance(r, dict) for r in found):
        raise InputError(f"{path} holds no questions")
    return found
