"""Benchmark tasks by name, ready to be asked: ours, files of questions, or the harness's own.

Our task files with a data folder, and files of questions, become tasks of the harness. Every
question has a key, so that those that chose a model can be left out where it is judged.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.data.text_files import json_lines
from isingcut.errors import InputError, MissingExtraError, UnknownNameError
from isingcut.files.inputs import read_bytes, user_path
from isingcut.files.writing import file_sha256, fingerprint

WIKITEXT = "wikitext2"
"""The perplexity that stands among the tasks and has no questions."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A task by name.

    Attributes:
        metric: that is reported; None for the harness's usual one.
        source: where its questions are from.
        limit: at most so many questions of each of its objects; None where that is seen to.
        configurations: of the harness, one or one a subject, with `custom_dataset`; None for one of
            the harness's own tasks.
    """

    name: str
    metric: str | None
    source: str
    limit: int | None = None
    configurations: Sequence[dict[str, Any]] | None = None

    def make(self) -> dict[str, Any]:
        """The harness's objects of it, anew for each model."""
        if self.configurations is None:
            return _hub(self.name)
        from lm_eval.api.task import ConfigurableTask

        return {c["task"]: ConfigurableTask(config=dict(c)) for c in self.configurations}

    def keys(self, made: dict[str, Any]) -> dict[str, list[str]]:
        """The questions of what `make` gave, each by its key, in their order."""
        return {t: [*map(question_key, islice(m.eval_docs, self.limit))] for t, m in made.items()}

    @property
    def generates(self) -> bool:
        """Whether the model writes the answers, which no likelihood tells."""
        with quiet():
            kinds = [each.OUTPUT_TYPE for each in self.make().values()]
        return "generate_until" in kinds

    def pool(self) -> list[str]:
        """The keys of all its questions."""
        with quiet():
            return [key for keys in self.keys(self.make()).values() for key in keys]


def question_key(question: Any) -> str:
    """What tells a question from all others, in whatever task it stands."""
    return fingerprint(dict(question))


def short_name(name: str) -> str:
    """What a task is called in results: a file by its name alone."""
    return Path(name).name if is_file(name) else name


def split_names(tasks: str) -> list[str]:
    """The tasks in a comma-separated list, not yet known to be any; `all` are ours."""
    if tasks == "all":
        return [*task_names(), WIKITEXT]
    return [t.strip() for t in tasks.split(",") if t.strip()]


def prepare_task(name: str, data: Path | None, questions: int | None = None) -> Prepared:
    """A task by name: a file, one of ours with ``data``, else one of the harness's from the hub."""
    if is_file(name):
        return _read_file(user_path(name), questions)
    return (
        Prepared(name, None, "hub", questions)
        if data is None
        else _read_task(name, data, questions)
    )


def check_tasks(tasks: Sequence[str], data: Path | None, questions: int | None) -> list[str]:
    """Refuse tasks or questions that cannot be scored, before a model is loaded.

    Returns:
        the tasks' names, each once.

    Raises:
        InputError: an unknown task, no questions for it, or one that its task cannot read.
        MissingExtraError: without the package lm_eval.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm_eval", "eval", "scoring benchmarks")
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data} is no folder; give the one with the questions")
    names = list(dict.fromkeys(tasks))
    for name in names:
        if name == WIKITEXT:
            if data is None:
                raise InputError("wikitext2 is read from a folder of questions; give it as --data")
            articles(data)
        elif is_file(name) or data is not None:
            prepare_task(name, data, questions)
        else:
            _refuse_unknown(name)
    return names


def _refuse_unknown(name: str) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.task_index:
        raise InputError(
            f"lm-evaluation-harness knows no task {name!r}; offline tasks need --data and are: "
            f"{', '.join(task_names())}"
        )
    return manager


def _hub(name: str) -> dict[str, Any]:
    manager = _refuse_unknown(name)
    try:
        found: dict[str, Any] = manager.load([name])["tasks"]
    except Exception as e:
        words = " ".join(str(e).split())
        raise InputError(
            f"lm-evaluation-harness cannot load {name!r} from the hub ({words}); offline, give a "
            "folder of questions as --data"
        ) from e
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness logs and draws bars of its own; ours is shown instead."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


# Ours, and files of questions ----------------------------------------------------------------

_FOLDER = Path(__file__).parent / "tasks"
_LARGEST = 2**28
_MOST_CHOICES = 64


def task_names() -> list[str]:
    """All local tasks."""
    return sorted(p.stem for p in _FOLDER.glob("[a-z]*.yaml"))


def is_file(name: str) -> bool:
    """Whether a task's name is that of a file of questions."""
    return name.endswith(".jsonl")


def _read_file(path: Path, questions: int | None) -> Prepared:
    """A task over a user's own file: ``context``, ``choices`` and ``answer``, its number from 0.

    Args:
        questions: at most so many, evenly spaced.

    Raises:
        InputError: it is missing or damaged.
    """
    asked = _spaced(_asked(path, "multiple_choice", {}), questions)
    config = {**_configuration("_file"), "task": path.stem, "test_split": "test"}
    config["custom_dataset"] = _dataset(asked, [])
    return Prepared(path.name, "acc_norm", file_sha256(path), configurations=[config])


def _read_task(name: str, data: Path, questions: int | None) -> Prepared:
    """A local task over the questions in a data folder.

    Args:
        name: one of `task_names`.
        data: the folder with `arc_easy/test.jsonl` and so on.
        questions: at most so many. Where the folder has a fixed subset of that size or more
            (`test_sub500.jsonl`), they are taken from it, evenly spaced.

    Raises:
        UnknownNameError: no such task.
        InputError: its file is missing or damaged.
    """
    if name not in task_names():
        raise UnknownNameError(f"unknown local task {name!r}; known: {', '.join(task_names())}")
    config = _configuration(name)
    own = config.pop("isingcut")
    kind, by = str(config["output_type"]), own.get("by")
    asked = _questions(data, own, questions, kind)
    examples = _asked(_only(data, own["fewshot"]), kind, own) if "fewshot" in own else []
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
    return Prepared(name, str(own["metric"]), "local", configurations=configurations)


def _configuration(name: str) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


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
    if os.path.lexists(exact):
        return exact
    numbered = sorted(data.glob(f"{stem}[0-9]*.jsonl"))
    if len(numbered) != 1:
        raise InputError(f"there is no file {exact}; give the folder with the questions as --data")
    return numbered[0]


def _questions(
    data: Path, own: dict[str, Any], most: int | None, kind: str
) -> list[dict[str, Any]]:
    stem = own["test"]
    subsets = sorted(
        (int(size), p)
        for p in data.glob(f"{stem}_sub[0-9]*.jsonl")
        if (size := p.stem.rpartition("_sub")[2]).isdigit()
    )
    large = [file for size, file in subsets if most is not None and size >= most]
    return _spaced(_asked(large[0] if large else _only(data, stem), kind, own), most)


def _spaced(found: list[dict[str, Any]], most: int | None) -> list[dict[str, Any]]:
    """At most so many, evenly spaced."""
    if most is None or len(found) <= most:
        return found
    picks = np.linspace(0, len(found) - 1, most).round().astype(int)
    return [found[i] for i in picks]


def _asked(path: Path, kind: str, own: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a file, of each the fields that a task reads.

    Args:
        kind: the harness's ``output_type`` of the task.
        own: our part of the task file.

    Raises:
        InputError: missing, damaged, empty or larger than 256 MiB; or a field is missing or of a
            wrong type, with the line.
    """
    texts = {"loglikelihood": ["text"], "generate_until": ["context", "solution"]}
    needed = [*texts.get(kind, ["context"]), *([own["by"]] if "by" in own else [])]
    found = []
    fields = needed if kind in texts else [*needed, "choices", "answer"]
    content = read_bytes(path, "the file of questions", limit=_LARGEST)
    for where, record in json_lines(io.BytesIO(content), str(path), InputError):
        wrong = _wrong_text(record, needed, own)
        if wrong is None and kind not in texts:
            wrong = _wrong_choice(record, own)
        if wrong is not None:
            raise InputError(f"{where}: {wrong}")
        found.append({name: record[name] for name in fields})
    if not found:
        raise InputError(f"{path} holds no questions")
    return found


def _wrong_text(record: dict[str, Any], needed: list[str], own: dict[str, Any]) -> str | None:
    for name in needed:
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            return f"expected a text {name!r}, got {repr(value)[:60]}"
    held = own.get("holds", "")
    if held not in record[needed[0]].strip():
        return f"expected {held!r} in {needed[0]!r}, got {record[needed[0]][:60]!r}"
    return None


def _wrong_choice(record: dict[str, Any], own: dict[str, Any]) -> str | None:
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        return f"expected 'choices', a list of texts, none empty, got {repr(choices)[:60]}"
    least, most = (own["choices"],) * 2 if "choices" in own else (2, _MOST_CHOICES)
    if not least <= len(choices) <= most:
        return f"expected {least}{f' to {most}' * (most > least)} 'choices', got {len(choices)}"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"expected 'answer', a number from 0 to {len(choices) - 1}, got {repr(answer)[:60]}"
    return None


def articles(data: Path) -> list[str]:
    """The articles of WikiText-2's test text in a data folder; errors as for questions."""
    return [r["text"] for r in _asked(data / "wikitext2" / "test_raw.jsonl", "loglikelihood", {})]
