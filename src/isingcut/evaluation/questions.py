"""Benchmark tasks by name, ready to be asked: ours, files of questions, or the harness's own.

Every question has a key, so that those that chose a model can be left out where it is judged.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from isingcut.errors import InputError, MissingExtraError
from isingcut.evaluation import local_tasks
from isingcut.evaluation.wikitext import articles
from isingcut.files.inputs import user_path
from isingcut.files.outputs import file_sha256
from isingcut.files.writing import fingerprint

WIKITEXT = "wikitext2"
"""The perplexity that stands among the tasks and has no questions."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A task by name, and how to make the harness's objects of it (anew for each model).

    Attributes:
        metric: that is reported; None for the harness's usual one.
        source: where its questions are from.
        limit: at most so many questions of each of its objects; None where that is seen to.
    """

    name: str
    metric: str | None
    make: Callable[[], dict[str, Any]]
    source: str
    limit: int | None = None

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


def called(name: str) -> str:
    """What a task is called in results: a file by its name alone."""
    return Path(name).name if local_tasks.is_file(name) else name


def named(tasks: str) -> list[str]:
    """The tasks in a comma-separated list, not yet known to be any; `all` are ours."""
    if tasks == "all":
        return [*local_tasks.task_names(), WIKITEXT]
    return [t.strip() for t in tasks.split(",") if t.strip()]


def prepare_task(name: str, data: Path | None, questions: int | None = None) -> Prepared:
    """A task by name: a file, one of ours with ``data``, else one of the harness's from the hub."""
    if local_tasks.is_file(name):
        path = user_path(name)
        local, source = local_tasks.read_file(path, questions), file_sha256(path)
    elif data is None:
        return Prepared(name, None, lambda: _hub(name), "hub", questions)
    else:
        local, source = local_tasks.read_task(name, data, questions), "local"

    def make() -> dict[str, Any]:
        from lm_eval.api.task import ConfigurableTask

        return {c["task"]: ConfigurableTask(config=dict(c)) for c in local.configurations}

    return Prepared(local.name, local.metric, make, source)


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
        elif local_tasks.is_file(name):
            local_tasks.read_file(user_path(name), questions)
        elif data is not None:
            local_tasks.read_task(name, data, questions)
        else:
            _refuse_unknown(name)
    return names


def _refuse_unknown(name: str) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.task_index:
        raise InputError(
            f"lm-evaluation-harness knows no task {name!r}; offline tasks need --data and are: "
            f"{', '.join(local_tasks.task_names())}"
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
