"""Benchmark scores of two models on the same questions, with lm-evaluation-harness as the engine.

task names -> harness tasks -> scores of each question, for both models -> paired comparison
"""

from __future__ import annotations

import contextlib
import glob
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isingcut.console.progress import Part, Progress, silent
from isingcut.errors import InputError, StageFileError
from isingcut.evaluation.certainty import certainties
from isingcut.evaluation.likelihoods import Answer, Answers, Row
from isingcut.evaluation.paired import compare_scores
from isingcut.evaluation.questions import Prepared, called, prepare_task, quiet
from isingcut.files.writing import fingerprint, read_json, write_json
from isingcut.ising.states import Floats, states_of
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, skipped, stack_modules
from isingcut.models.replay import Replay
from isingcut.models.sources import model_identity
from isingcut.options.types import BATCH_TOKENS

if TYPE_CHECKING:
    from isingcut.evaluation.harness import Harness
    from isingcut.models.load import LoadedModel

_ARRAYS = ("values", "certainties")
_PREFERRED = ("acc_norm,none", "acc,none", "exact_match,flexible-extract", "exact_match,none")


@dataclass(frozen=True, eq=False)
class Scores:
    """One model on one task.

    Attributes:
        task: its name.
        metric: what the values are, as the harness names it.
        values: (n,) by question, in the order of ``questions``.
        certainties: (n,) log-probability of the right answer, nats: among the choices, at the
            temperature that suits the model's answers to these questions best, for being too sure
            of oneself costs no score; of a continuation as it is; ``values`` where the model
            writes its answers.
        questions: what tells the questions apart (task and hash of the record).
        shots: examples in each prompt.
    """

    task: str
    metric: str
    values: Floats
    certainties: Floats
    questions: list[str]
    shots: int

    @classmethod
    def load(cls, path: Path) -> Scores:
        """What `save` kept."""
        content = read_json(path, "scores")
        rest = {name: content[name] for name in ("task", "metric", "questions", "shots")}
        values, certain = (np.array(content[k], dtype=np.float64) for k in _ARRAYS)
        return cls(values=values, certainties=certain, **rest)

    def save(self, path: Path) -> None:
        """Keep them while the other model is asked."""
        lists = {name: getattr(self, name).tolist() for name in _ARRAYS}
        write_json(path, "scores", {**vars(self), **lists})


@dataclass(frozen=True, eq=False)
class Asked:
    """A model that can be asked.

    Attributes:
        loaded: it; of one that is read block by block what there is without its weights.
        replay: its blocks.
    """

    loaded: LoadedModel
    replay: Replay

    @classmethod
    def whole(cls, loaded: LoadedModel) -> Asked:
        """A model in memory."""
        blocks = stack_modules(loaded.model, find_stack(loaded.model))
        return cls(loaded, Replay(loaded.model, blocks))


def benchmark(
    models: Mapping[str, Asked],
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    questions: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    but: Collection[str] = (),
    kept: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Rows of `benchmarks.json`: the second model against the first, task by task.

    Args:
        models: two, by name; rows call them ``original`` and ``cut``.
        tasks: local task names, or with no ``data`` any task of the harness, or files of questions.
        data: folder of the local tasks' questions; None uses the hub.
        questions: at most so many a task.
        batch_tokens: tokens computed at a time.
        but: questions to leave out, by their `question_key`.
        kept: folder for finished tasks, so that an interrupted call goes on.

    Raises:
        InputError: as `questions.check_tasks`, or a task without a score by question.
    """
    assert len(models) == 2
    prepared = [prepare_task(name, data, questions) for name in tasks]
    left_out = frozenset(but)
    wanted = (lambda key: key not in left_out) if left_out else None
    rows = []
    with progress("benchmarks", 2 * len(prepared)) as bar:
        for task in prepared:
            pair = []
            for name, model in models.items():
                place, part = None, Part(bar, 1)
                if kept is not None:
                    place = place_of(kept, task, model.loaded, [questions, *sorted(left_out)])
                if place is not None and place.exists():
                    found = Scores.load(place)
                else:
                    found = score(model, task, Work(batch_tokens, part), wanted=wanted)
                    if place is not None:
                        found.save(place)
                part.finish(f"{task.name}, {name}: {found.values.mean():.3f}")
                pair.append(found)
            rows.append(row(*pair))
    return rows


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


def score(
    model: Asked,
    task: Prepared,
    work: Work | None = None,
    *,
    wanted: Callable[[str], bool] | None = None,
) -> Scores:
    """Score one model on one task, as `score_states`."""
    return score_states(model, task, [()], work, wanted=wanted)[0]


def score_states(
    model: Asked,
    task: Prepared,
    removed: Sequence[Sequence[int]],
    work: Work | None = None,
    *,
    wanted: Callable[[str], bool] | None = None,
) -> list[Scores]:
    """Score a model without some of its blocks on one task, for each of several such states.

    What is asked by likelihood is asked of all states in one go; text is generated by one after
    the other.

    Args:
        removed: each state's blocks.
        work: how it is computed.
        wanted: whether to ask a question, by its key; None asks all.

    Raises:
        InputError: no question is wanted, or none has a score.
    """
    work, (loaded, replay) = work or Work(), (model.loaded, model.replay)
    states = states_of(len(replay), [tuple(blocks) for blocks in removed])
    answers = Answers(replay, states, work, task.name)
    stack, batch = find_stack(loaded.model), max(1, work.batch_tokens // 128)
    shown = sys.stderr

    def answer(state: int, rows: Sequence[Row]) -> Sequence[Answer]:
        # Only the harness is quiet: here a bar moves.
        with contextlib.redirect_stderr(shown):
            return answers.of(state, rows)

    with quiet():
        from isingcut.evaluation.harness import Harness

        found = []
        for s, blocks in enumerate(removed):
            generating = partial(skipped, loaded.model, stack, blocks)
            engine = Harness(loaded, partial(answer, s), batch, generating)
            found.append(_asked(engine, task, wanted))
    return found


def _asked(model: Harness, task: Prepared, wanted: Callable[[str], bool] | None) -> Scores:
    """What the harness makes of a model's answers to a task."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    made = task.make()
    picked = None
    if wanted is not None:
        keys = task.keys(made)
        picked = {t: [i for i, key in enumerate(keys[t]) if wanted(key)] for t in made}
        # To the harness an empty list means all of them.
        made = {t: each for t, each in made.items() if picked[t]}
        if not made:
            raise InputError(f"no question of {task.name} is left that nothing was chosen by")
    for each in made.values():
        # As the harness's own front door does it.
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    loaded_tasks = {"tasks": made, "groups": {}, "group_map": {}}
    limit = task.limit if picked is None else None
    found: Any = evaluate(
        lm=model, task_dict=loaded_tasks, bootstrap_iters=0, limit=limit, samples=picked
    )
    samples = [(name, s) for name in found["samples"] for s in found["samples"][name]]
    metric = task.metric or _metric(task.name, samples)
    name, _, which = metric.partition(",")
    chosen = [(t, s) for t, s in samples if s["filter"] == (which or "none") and name in s]
    if not chosen:
        raise InputError(f"{task.name} gives no {metric} by question; choose another task")
    chosen.sort(key=lambda pair: (pair[0], pair[1]["doc_id"]))
    values = np.array([float(s[name]) for _, s in chosen])
    return Scores(
        task.name,
        metric,
        values,
        certainties([(made[t], s) for t, s in chosen], values, by_length=name == "acc_norm"),
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


def place_of(kept: Path, task: Prepared, loaded: LoadedModel, asked: Any) -> Path:
    """Where the scores of one model on one task are kept.

    Args:
        asked: what else they depend on, JSON-able.
    """
    model = model_identity(loaded.folder)["sha256"]
    identity = fingerprint([task.name, task.source, model, str(loaded.dtype), asked, _ARRAYS])
    return kept / f"{task.name}-{identity}.json"


def forget_scores(kept: Path, tasks: Sequence[str]) -> None:
    """Delete the finished tasks in a folder, and the folder where nothing else is in it."""
    for name in map(called, tasks):
        for path in kept.glob(f"{glob.escape(name)}-*.json"):
            with contextlib.suppress(StageFileError):
                read_json(path, "scores")
                path.unlink()
    with contextlib.suppress(OSError):
        kept.rmdir()
