"""Score models on benchmark tasks, question by question, with lm-evaluation-harness.

a task -> its harness objects -> log-likelihoods and generations of all states -> scores
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from isingcut.console.printing import say
from isingcut.data.generation import Generated, prompt_ids
from isingcut.errors import InputError, ModelError
from isingcut.evaluation.answers import (
    Continuation,
    Likelihood,
    Prompt,
    Text,
    Writer,
    answer_scores,
    generate_texts,
)
from isingcut.evaluation.questions import Prepared, quiet
from isingcut.formats.architectures.blocks import skip_blocks
from isingcut.ising.states import Floats, states_of
from isingcut.measure.work import PLAIN, Work
from isingcut.models.load import LoadedModel

if TYPE_CHECKING:
    from isingcut.evaluation.harness import Harness

_PREFERRED = (
    "acc_norm,none",
    "acc,none",
    "exact_match,flexible-extract",
    "exact_match,none",
)
_TEMPERATURES = np.exp(np.linspace(-2.0, 4.0, 61))


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one model on one task.

    Attributes:
        task: its name.
        metric: the name of the metric in the harness.
        values: (n,) values per question, in the order of ``questions``.
        certainties: (n,) log-probability of the right answer, nats. For choices, it is computed at
            the temperature that fits the answers best, because overconfidence does not affect
            scores; for a continuation, it is unchanged; for generated answers, it is ``values``.
        answers: for each question the number of the picked choice or the extracted text; for other
            tasks the score.
        choices: for each question the log-likelihoods of its choices (`read_choices`), nats.
        questions: the keys of the questions (task and hash of the record).
        shots: examples in each prompt.
        written: for each question the tokens of the prompt and of the generated answer; empty for
            other tasks.
    """

    task: str
    metric: str
    values: Floats
    certainties: Floats
    answers: list[Any]
    choices: list[Floats]
    questions: list[str]
    shots: int
    written: Sequence[tuple[list[int], Generated]] = ()


def check_task(loaded: LoadedModel, task: Prepared) -> None:
    """Check what the tokenizer, the template and the config of a model tell about a task.

    Raises:
        InputError: it generates text, but the model is streamed or has too few positions.
        ModelError: the chat template refuses a prompt.
    """
    with quiet():
        from isingcut.evaluation.harness import Harness

        engine = Harness(loaded, lambda rows: [], lambda *prompts: [], chat=task.chat)
        for each in task.make().values():
            if each.OUTPUT_TYPE == "generate_until":
                if loaded.streamed:
                    raise InputError(
                        f"{task.name} needs the whole model, which does not fit the memory limit; "
                        "raise --memory-limit, or remove it from --tasks"
                    )
                engine.limits(each.get_config("generation_kwargs"))
        if engine.chat:
            prompt_ids(loaded.tokenizer, task.name)


def score_states(
    loaded: LoadedModel,
    task: Prepared,
    removed: Sequence[Sequence[int]],
    work: Work = PLAIN,
    *,
    wanted: Callable[[str], bool] = lambda key: True,
) -> list[Scores]:
    """Score several states of a model on one task.

    Log-likelihoods are computed for all states at once; texts are generated for one state after the
    other.

    Args:
        loaded: the model, in memory or streamed.
        removed: the removed blocks of each state.
        work: batch size, progress display and journal; the journal belongs to one task.
        wanted: function of a question's key, whether to use the question.

    Raises:
        InputError: no question is left, or none has a score.
        ModelError: a log-likelihood is not finite.
    """
    replay = loaded.replay
    states = states_of(len(replay), removed)
    # The answers to each row under all states, which are computed together.
    known = dict[Continuation, list[Likelihood]]()
    shown = sys.stderr

    # Stderr is hidden for the harness only; these functions show progress.
    def answer(state: int, rows: Sequence[Continuation]) -> Sequence[Likelihood]:
        if new := [row for row in dict.fromkeys(rows) if row not in known]:
            with contextlib.redirect_stderr(shown):
                both = answer_scores(replay, new, states, work, task.name)
            of_rows = (of_states.T.tolist() for of_states in both)
            for row, likely, greedy in zip(new, *of_rows, strict=True):
                known[row] = [*zip(likely, greedy, strict=True)]
        return [known[row][state] for row in rows]

    def generate(state: int, prompts: Sequence[Prompt], write: Writer) -> list[Text]:
        with (
            contextlib.redirect_stderr(shown),
            skip_blocks(loaded.model, removed[state]),
        ):
            return generate_texts(
                replay, removed[state], prompts, write, work, task.name
            )

    with quiet():
        from isingcut.evaluation.harness import Harness

        scores = []
        for s in range(len(removed)):
            engine = Harness(
                loaded, partial(answer, s), partial(generate, s), chat=task.chat
            )
            try:
                scores.append(_score_one(engine, task, wanted))
            except ModelError as e:
                raise ModelError(f"{task.name}: {e}") from e
            if not s and engine.shortened:
                with contextlib.redirect_stderr(shown):
                    say(
                        f"isingcut: warning: {engine.shortened} of {engine.asked} prompts of "
                        f"{task.name} are longer than the {engine.max_length} positions of "
                        f"{loaded.folder}; their beginnings are left out, as "
                        "lm-evaluation-harness does"
                    )
    return scores


def _score_one(model: Harness, task: Prepared, wanted: Callable[[str], bool]) -> Scores:
    """Score a model on a task with the harness."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate

    made = task.make()
    keys = task.keys(made)
    picked = {t: [i for i, key in enumerate(keys[t]) if wanted(key)] for t in made}
    # The harness takes an empty list as all questions.
    made = {t: each for t, each in made.items() if picked[t]}
    if not made:
        raise InputError(
            f"all questions of {task.name} were used for the choice; give more"
        )
    for each in made.values():
        # As the harness's own entry point does.
        if each.get_config("num_fewshot") is None:
            each.set_config(key="num_fewshot", value=0)
        each.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)

    results: Any = evaluate(
        lm=model,
        task_dict={"tasks": made, "groups": {}, "group_map": {}},
        bootstrap_iters=0,
        samples=picked,
        apply_chat_template=model.chat,
    )
    samples = [
        (name, s) for name, of_task in results["samples"].items() for s in of_task
    ]
    metric = task.metric or _metric(task.name, samples)
    name, _, which = metric.partition(",")
    chosen = [
        (t, s) for t, s in samples if s["filter"] == (which or "none") and name in s
    ]
    if not chosen:
        raise InputError(
            f"{task.name} has no {metric} per question; choose another task"
        )
    chosen.sort(key=lambda pair: (pair[0], pair[1]["doc_id"]))
    values = np.array([float(s[name]) for _, s in chosen])
    if not np.isfinite(values).all():
        raise InputError(
            f"a question of {task.name} has no finite {metric}; choose another task"
        )
    answered = [(made[t], s) for t, s in chosen]
    choices = [read_choices(*each, by_length=name == "acc_norm") for each in answered]
    likely = [likely for likely, _ in choices]
    return Scores(
        task.name,
        metric,
        values,
        certainties(answered, values, choices),
        [*map(_answer, answered, likely, values)],
        likely,
        [f"{t}:{s['doc_hash'][:16]}" for t, s in chosen],
        int(next(iter(results["n-shot"].values()))),
        [model.written[s["arguments"][0][0]] for _, s in chosen if model.written],
    )


def _answer(of: tuple[Any, dict[str, Any]], likely: Floats, score: float) -> Any:
    task, sample = of
    if len(likely):
        return int(likely.argmax())
    return (
        sample["filtered_resps"][0] if task.OUTPUT_TYPE == "generate_until" else score
    )


def _metric(task: str, samples: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Return the usual metric of a hub task."""
    present = {f"{m},{s['filter']}": s[m] for _, s in samples for m in s["metrics"]}
    for metric in (*_PREFERRED, *sorted(present)):
        if isinstance(present.get(metric), int | float):
            return metric
    raise InputError(
        f"{task} has no score per question to compare; choose another task"
    )


# Log-probabilities of right answers separate two models with fewer questions than accuracies do. On
# unseen questions they rank cut models better (docs/experiments.md).


def certainties(
    answered: Sequence[tuple[Any, dict[str, Any]]],
    scores: Floats,
    choices: Sequence[tuple[Floats, list[int]]],
) -> Floats:
    """Return the log-probability of each right answer, in nats, or its score.

    The score is used for generated answers, and for harness tasks that do not mark the right choice
    in the usual way.

    Args:
        answered: for each question the harness's task and its record of the answers.
        scores: (n,) scores of the questions.
        choices: for each question what `read_choices` returns.
    """
    certain = np.array(scores, dtype=np.float64)
    margins = dict[int, Floats]()
    for i, (task, sample) in enumerate(answered):
        likely, right = choices[i]
        if task.OUTPUT_TYPE == "loglikelihood":
            certain[i] = sample["filtered_resps"][0][0]
        elif right:
            margins[i] = np.delete(likely, right) - likely[right].max()
    if margins:
        certain[list(margins)] = temper_margins(list(margins.values()))
    return certain


def temper_margins(margins: Sequence[Floats]) -> Floats:
    """Return (n,) log-probabilities of right choices at the temperature that maximises them.

    Args:
        margins: for each question the log-likelihoods of its wrong choices minus the right one's.
    """
    # The right choice itself has the margin 0.
    rows = [np.array([0.0, *own]) for own in margins]
    each = [
        np.array([-np.logaddexp.reduce(row / t) for row in rows]) for t in _TEMPERATURES
    ]
    return max(each, key=lambda values: float(values.mean()))


def read_choices(
    task: Any, sample: dict[str, Any], *, by_length: bool
) -> tuple[Floats, list[int]]:
    """Return the log-likelihoods of a question's choices, and the numbers of the right ones.

    Both are empty for questions without choices; the numbers also if none is marked as right.

    Args:
        task: the harness's task.
        sample: its record of the answers.
        by_length: compare log-likelihoods per character, as in ``acc_norm``.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "multiple_input"):
        # The second is a task that is defined in code, with its own scoring.
        return np.zeros(0), []
    question = sample["doc"]
    choices = list(task.doc_to_choice(question))
    gold = (task.doc_to_text if task.multiple_input else task.doc_to_target)(question)
    right = [
        choices.index(g) if g in choices else g
        for g in (gold if isinstance(gold, list) else [gold])
    ]
    # Log-likelihoods without the question may follow, for other metrics.
    likely = np.array(
        [answer[0] for answer in sample["filtered_resps"][: len(choices)]]
    )
    if by_length:
        lengths = np.array([max(1, len(choice)) for choice in choices])
        likely = likely / lengths * lengths.mean()
    return likely, [g for g in right if g in range(len(choices))]
