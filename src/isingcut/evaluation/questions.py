"""Prepare benchmark tasks by name: isingcut's tasks, files of questions, or harness tasks.

isingcut's task files with a data folder, and files of questions, are converted to harness tasks.
Every question has a key, so that questions used to choose a model are left out of its evaluation.
"""

import contextlib
import functools
import importlib.util
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.data.corpora import quiet_logs
from isingcut.data.text_files import json_lines
from isingcut.errors import InputError, MissingExtraError, UnknownNameError
from isingcut.evaluation import checks
from isingcut.files.inputs import read_bytes, user_path
from isingcut.files.results import fingerprint


@dataclass(frozen=True, eq=False)
class Prepared:
    """A benchmark task, ready to be created for a model.

    Attributes:
        metric: the metric to report; None for the harness's usual one.
        source: ``hub``, or the hash of the questions.
        limit: maximum number of questions per harness object; None if limited already.
        configurations: harness configurations, one or one per subject, with `custom_dataset`; None
            for a task of the harness.
        chat: whether prompts are chat turns, if the tokenizer has a chat template.
    """

    name: str
    metric: str | None
    source: str
    limit: int | None = None
    configurations: Sequence[dict[str, Any]] | None = None
    chat: bool = False

    def make(self) -> dict[str, Any]:
        """Create the harness objects of the task, which must be new for each model."""
        if self.configurations is None:
            return _hub(self.name)
        from lm_eval.api.task import ConfigurableTask

        return {
            c["task"]: ConfigurableTask(config=dict(c)) for c in self.configurations
        }

    def keys(self, made: dict[str, Any]) -> dict[str, list[str]]:
        """Return the question keys of each harness object that `make` returned, in order."""
        return {
            t: [*map(question_key, islice(m.eval_docs, self.limit))]
            for t, m in made.items()
        }

    def pool(self) -> list[str]:
        """Return the keys of all questions of the task."""
        with quiet():
            return [key for keys in self.keys(self.make()).values() for key in keys]


def question_key(question: Any) -> str:
    """Return the key of a question, unique over all tasks."""
    return fingerprint(dict(question))


def short_name(name: str) -> str:
    """Return the name of a task in results: for a file, its name without the folder."""
    return Path(name).name if is_file(name) else name


def split_names(tasks: str) -> list[str]:
    """Split a comma-separated list of tasks, unchecked and without duplicates.

    `all` means all tasks of isingcut.
    """
    if tasks == "all":
        return task_names()
    return list(dict.fromkeys(t.strip() for t in tasks.split(",") if t.strip()))


def prepare_task(
    name: str, data: Path | None, questions: int | None = None
) -> Prepared:
    """Prepare a task by name.

    Args:
        name: a file; a task of isingcut, with ``data`` if it is not in `SHIPPED`; or a task of the
            harness.
        data: folder of questions.
        questions: maximum number of questions.
    """
    if name in SHIPPED:
        return _make_shipped(name, questions)
    if not is_file(name) and data is None:
        return Prepared(name, None, "hub", questions)
    return _read_task(name, data or Path(), questions)


def check_tasks(names: Sequence[str], data: Path | None, questions: int | None) -> None:
    """Check tasks and their questions before a model is loaded.

    Raises:
        InputError: an unknown task, two files of one name, a task without questions, or an invalid
            question.
        MissingExtraError: the package lm_eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm_eval", "eval", "scoring benchmarks")
    if data is not None and not data.is_dir():
        raise InputError(
            f"--data {data} is not a folder; give the folder with the questions"
        )
    shown = [short_name(name) for name in names]
    if twice := [name for name in shown if shown.count(name) > 1]:
        raise InputError(f"--tasks has two files named {twice[0]}; rename one of them")
    for name in names:
        if is_file(name) or data is not None or name in SHIPPED:
            prepare_task(name, data, questions)
        elif name not in _manager().task_index:
            raise InputError(
                f"lm-evaluation-harness has no task {name!r}; tasks with --data are: "
                f"{', '.join(task_names())}"
            )


@functools.cache
def _manager() -> Any:
    """Return the harness's task manager, which reads thousands of files when it is created."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _hub(name: str) -> dict[str, Any]:
    try:
        tasks: dict[str, Any] = _manager().load([name])["tasks"]
    except Exception as e:
        words = " ".join(str(e).split())
        raise InputError(
            f"lm-evaluation-harness cannot load {name!r} from the hub ({words}); without network, "
            "give a folder of questions as --data"
        ) from e
    return tasks


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs and progress bars of the harness."""
    with (
        quiet_logs("lm_eval"),
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


# Tasks of isingcut, and files of questions ---------------------------------------------------

SHIPPED = {
    "instructions": (checks.read_instructions, checks.score_instruction),
    "needle": (checks.hide_needles, checks.score_needle),
}
"""Tasks that need no data: functions that make the questions, and that score an answer."""
_LARGEST = 2**28
_MOST_CHOICES = 64


def task_names() -> list[str]:
    """Return the names of all local tasks."""
    return sorted(_configurations().keys() - {"_file"})


def is_file(name: str) -> bool:
    """Whether a task's name is a file of questions."""
    return name.endswith(".jsonl")


def _make_shipped(name: str, questions: int | None) -> Prepared:
    """Make a task of `SHIPPED`, with at most so many questions, evenly spaced."""
    make, score = SHIPPED[name]
    records = _spread(make(), questions)
    config = {
        "task": name,
        "test_split": "test",
        **_configurations()[name],
        "custom_dataset": _dataset(records, []),
        "process_results": score,
    }
    own = config.pop("isingcut")
    return Prepared(name, configurations=[config], source=fingerprint(records), **own)


def _read_task(name: str, data: Path, questions: int | None) -> Prepared:
    """Read a local task with the questions in a data folder, or in a user's file.

    Args:
        name: one of `task_names`, or a file with ``context``, ``choices`` and ``answer``, an index
            from 0.
        data: the folder with `arc_easy/test.jsonl` and so on.
        questions: maximum number of questions; taken evenly spaced.

    Raises:
        UnknownNameError: no such task.
        InputError: the task's file is missing or damaged, or has too few examples.
    """
    path = user_path(name) if is_file(name) else None
    if path is None and name not in task_names():
        raise UnknownNameError(
            f"unknown local task {name!r}; known: {', '.join(task_names())}"
        )
    task = path.stem if path else name
    config = {"task": task, **_configurations()["_file" if path else name]}
    own = config.pop("isingcut", {"metric": "acc_norm"})
    kind = str(config["output_type"])
    by = own.get("by")
    file = path or _find(data, own["test"])
    records = _spread(_read_records(file, kind, own), questions)
    examples = list[dict[str, Any]]()
    if "fewshot" in own:
        file = _find(data, own["fewshot"])
        examples = _read_records(file, kind, own)
    groups = dict.fromkeys(r[by] for r in records) if by else [""]
    configurations = []
    for group in groups:
        one = {**config, "test_split": "test"}
        if by:
            about = group.replace("_", " ")
            one["task"] = f"{task}_{group}"
            one["description"] = config["description"].replace("{by}", about)
        chosen = [r for r in records if not by or r[by] == group]
        shots = [r for r in examples if not by or r[by] == group]
        if len(shots) < int(one["num_fewshot"]):
            raise InputError(
                f"{file} has {len(shots)} examples{f' about {group}' if group else ''}; {name} "
                f"needs {one['num_fewshot']}"
            )
        one["custom_dataset"] = _dataset(chosen, shots)
        if shots:
            one["fewshot_split"] = "fewshot"
        configurations.append(one)
    source = fingerprint(records if path else [records, examples])
    return Prepared(
        short_name(name), str(own["metric"]), source, configurations=configurations
    )


def _configurations() -> dict[str, dict[str, Any]]:
    import yaml

    tasks: dict[str, dict[str, Any]] = yaml.safe_load(
        Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    )
    return tasks


def _dataset(test: list[dict[str, Any]], fewshot: list[dict[str, Any]]) -> Any:
    def make(**ignored: Any) -> dict[str, Any]:
        import datasets

        splits = {"test": test, "fewshot": fewshot}
        return {
            k: datasets.Dataset.from_list(rows) for k, rows in splits.items() if rows
        }

    return make


def _find(data: Path, stem: str) -> Path:
    """Return `stem.jsonl`, or the only file with digits after the stem (`train1000.jsonl`)."""
    exact = data / f"{stem}.jsonl"
    if os.path.lexists(exact):
        return exact
    numbered = sorted(data.glob(f"{stem}[0-9]*.jsonl"))
    if len(numbered) != 1:
        raise InputError(
            f"{exact} does not exist; give the folder with the questions as --data"
        )
    return numbered[0]


def _spread(records: list[dict[str, Any]], most: int | None) -> list[dict[str, Any]]:
    """Return at most ``most`` records, evenly spaced."""
    if most is None or len(records) <= most:
        return records
    picks = np.linspace(0, len(records) - 1, most).round().astype(int)
    return [records[i] for i in picks]


def _read_records(path: Path, kind: str, own: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the records of a file, with the fields that a task needs.

    Args:
        kind: the harness's ``output_type`` of the task.
        own: isingcut's part of the task file.

    Raises:
        InputError: the file is missing, damaged, empty or larger than 256 MiB; or a field is
            missing or of a wrong type, with the line.
    """
    others = {"loglikelihood": ["text"], "generate_until": ["context", "solution"]}
    texts = [*others.get(kind, ["context"]), *([own["by"]] if "by" in own else [])]
    fields = texts if kind in others else [*texts, "choices", "answer"]
    records = []
    content = read_bytes(path, "the file of questions", limit=_LARGEST)
    for where, record in json_lines(io.BytesIO(content), str(path), InputError):
        expected = _find_fault(record, texts, own, choices=kind not in others)
        if expected:
            raise InputError(f"{where}: expected {expected}")
        records.append({name: record[name] for name in fields})
    if not records:
        raise InputError(f"{path} has no questions; give a file with at least one")
    return records


def _find_fault(
    record: dict[str, Any], texts: Sequence[str], own: dict[str, Any], *, choices: bool
) -> str:
    """Return the expected and the actual value of a wrong field; empty if the record is valid."""
    for name in texts:
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            return f"a text {name!r}, got {value!r:.60}"
    marker = own.get("holds")
    text = record[texts[0]]
    if marker and not text.strip().partition(marker)[2].strip():
        return f"{marker!r} and then text in {texts[0]!r}, got {text[:60]!r}"
    if not choices:
        return ""
    given = record.get("choices")
    answer = record.get("answer")
    if not isinstance(given, list) or not all(
        isinstance(c, str) and c.strip() for c in given
    ):
        return f"'choices', a list of texts, none empty, got {given!r:.60}"
    least = own.get("choices", 2)
    most = own.get("choices", _MOST_CHOICES)
    if not least <= len(given) <= most:
        return f"{least}{f' to {most}' * (most > least)} 'choices', got {len(given)}"
    if type(answer) is not int or not 0 <= answer < len(given):
        return f"'answer', a number from 0 to {len(given) - 1}, got {answer!r:.60}"
    return ""
