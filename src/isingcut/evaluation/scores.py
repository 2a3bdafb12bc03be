"""Benchmark scores of two models on the same questions, with lm-evaluation-harness as the engine.

task names -> harness tasks -> scores of each question, for both models -> paired comparison
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isingcut.console.progress import Bar, Progress, silent
from isingcut.errors import InputError, MissingExtraError, StageFileError
from isingcut.evaluation import local_tasks
from isingcut.evaluation.paired import compare_scores
from isingcut.evaluation.wikitext import articles
from isingcut.files.writing import fingerprint, read_json, write_json
from isingcut.ising.states import Floats
from isingcut.models.sources import model_identity

if TYPE_CHECKING:
    from isingcut.models.load import LoadedModel

_PREFERRED = ("acc_norm,none", "acc,none", "exact_match,flexible-extract", "exact_match,none")


@dataclass(frozen=True, eq=False)
class Scores:
    """One model on one task.

    Attributes:
        task: its name.
        metric: what the values are, as the harness names it.
        values: (n,) by question, in the order of ``questions``.
        questions: what tells the questions apart (task and hash of the record).
        shots: examples in each prompt.
    """

    task: str
    metric: str
    values: Floats
    questions: list[str]
    shots: int

    @classmethod
    def load(cls, path: Path) -> Scores:
        """What `save` kept."""
        content = read_json(path, "scores")
        rest = {name: content[name] for name in ("task", "metric", "questions", "shots")}
        return cls(values=np.array(content["values"], dtype=np.float64), **rest)

    def save(self, path: Path) -> None:
        """Keep them while the other model is asked."""
        write_json(path, "scores", {**vars(self), "values": self.values.tolist()})


def benchmark(
    models: Mapping[str, LoadedModel],
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    questions: int | None = None,
    batch: int = 8,
    kept: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Rows of `benchmarks.json`: the second model against the first, task by task.

    Args:
        models: two, by name; rows call them ``original`` and ``cut``.
        tasks: local task names, or with no ``data`` any task of the harness.
        data: folder of the local tasks' questions; None uses the hub.
        questions: at most so many a task.
        batch: sequences computed at a time.
        kept: folder for finished tasks, so that an interrupted call goes on.

    Raises:
        InputError: as `check_tasks`, or a task without a score by question.
    """
    assert len(models) == 2
    prepared = [prepare_task(name, data, questions) for name in tasks]
    rows = []
    with progress("benchmarks", 2 * len(prepared)) as bar:
        for task in prepared:
            pair = []
            for name, loaded in models.items():
                place = None if kept is None else _place(kept, task, loaded, questions)
                if place is not None and place.exists():
                    found = Scores.load(place)
                else:
                    found = score(loaded, task, questions, batch, bar, f"{task.name}, {name}")
                    if place is not None:
                        found.save(place)
                bar.advance(1, f"{task.name}, {name}: {found.values.mean():.3f}")
                pair.append(found)
            rows.append(row(*pair))
    return rows


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
        if name == "wikitext2":
            if data is None:
                raise InputError("wikitext2 is read from a folder of questions; give it as --data")
            articles(data)
        elif data is not None:
            local_tasks.read_task(name, data, questions)
        else:
            _refuse_unknown(name)
    return names


def row(original: Scores, cut: Scores) -> dict[str, Any]:
    """One row of `benchmarks.json`.

    Raises:
        InputError: the two were not scored on the same questions.
    """
    if original.questions != cut.questions or original.metric != cut.metric:
        raise InputError(f"the two models were scored on different questions of {original.task}")
    found = compare_scores(original.values, cut.values)
    return {
        "task": original.task,
        "metric": original.metric.removesuffix(",none"),
        "shots": original.shots,
        "original": found.first,
        "original_se": found.first_se,
        "cut": found.second,
        "cut_se": found.second_se,
        "difference": found.second - found.first,
        "difference_low": found.low,
        "difference_high": found.high,
        "n": found.n,
        "p_value": found.p_value,
        "test": found.test,
        "more_than_noise": found.more_than_noise,
    }


@dataclass(frozen=True, eq=False)
class Prepared:
    """A task by name, and how to make the harness's objects of it (anew for each model)."""

    name: str
    metric: str | None
    make: Callable[[], dict[str, Any]]
    source: str


def prepare_task(name: str, data: Path | None, questions: int | None = None) -> Prepared:
    """A task by name: one of ours with ``data``, else one of the harness's from the hub."""
    if data is None:
        return Prepared(name, None, lambda: _hub(name), "hub")
    local = local_tasks.read_task(name, data, questions)

    def make() -> dict[str, Any]:
        from lm_eval.api.task import ConfigurableTask

        return {c["task"]: ConfigurableTask(config=dict(c)) for c in local.configurations}

    return Prepared(name, local.metric, make, "local")


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


def score(
    loaded: LoadedModel,
    task: Prepared,
    questions: int | None = None,
    batch: int = 8,
    bar: Bar | None = None,
    note: str = "",
) -> Scores:
    """Score one model on one task."""
    with _quiet():
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.evaluator import evaluate

        from isingcut.evaluation.harness import Harness

        model = Harness(loaded, batch, bar, note)
        made = task.make()
        limit = questions if task.source == "hub" else None
        for each in made.values():
            # As the harness's own front door does it.
            if each.get_config("num_fewshot") is None:
                each.set_config(key="num_fewshot", value=0)
            each.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        loaded_tasks = {"tasks": made, "groups": {}, "group_map": {}}
        found: Any = evaluate(lm=model, task_dict=loaded_tasks, bootstrap_iters=0, limit=limit)
    samples = [(name, s) for name in found["samples"] for s in found["samples"][name]]
    metric = task.metric or _metric(task.name, samples)
    name, _, which = metric.partition(",")
    chosen = [(t, s) for t, s in samples if s["filter"] == (which or "none") and name in s]
    if not chosen:
        raise InputError(f"{task.name} gives no {metric} by question; choose another task")
    chosen.sort(key=lambda pair: (pair[0], pair[1]["doc_id"]))
    return Scores(
        task.name,
        metric,
        np.array([float(s[name]) for _, s in chosen]),
        [f"{t}:{s['doc_hash'][:16]}" for t, s in chosen],
        int(next(iter(found["n-shot"].values()))),
    )


def _metric(task: str, samples: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """The usual metric of a hub task."""
    present = {f"{m},{s['filter']}" for _, s in samples for m in s["metrics"]}
    for metric in (*_PREFERRED, *sorted(present)):
        if metric in present and isinstance(
            next(s for _, s in samples if metric.partition(",")[0] in s)[metric.partition(",")[0]],
            int | float,
        ):
            return metric
    raise InputError(f"{task} has no score by question that could be compared")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness logs and draws bars of its own; ours is shown instead."""
    import warnings

    logger = logging.getLogger("lm_eval")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _place(kept: Path, task: Prepared, loaded: LoadedModel, questions: int | None) -> Path:
    model = model_identity(loaded.folder)["sha256"]
    identity = fingerprint([task.name, task.source, model, str(loaded.dtype), questions])
    return kept / f"{task.name}-{identity}.json"


def forget_scores(kept: Path, tasks: Sequence[str]) -> None:
    """Delete the finished tasks in a folder, and the folder where nothing else is in it."""
    for name in tasks:
        for path in kept.glob(f"{glob.escape(name)}-*.json"):
            with contextlib.suppress(StageFileError):
                read_json(path, "scores")
                path.unlink()
    with contextlib.suppress(OSError):
        kept.rmdir()
