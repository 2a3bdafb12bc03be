"""Base class of studies that evaluate states of one model on texts and tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from isingcut.console.progress import terminal
from isingcut.data.tokens import TokenSet
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import Scores, score_states
from isingcut.files.provenance import versions
from isingcut.files.results import fingerprint
from isingcut.formats.sources import model_identity, resolve
from isingcut.ising.states import states_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models import load as models
from isingcut.models.replay import Replay
from studies.runner import STUDIES, Content, Part, Study
from studies.runner_texts import Texts
from studies.runner_wheels import WHEELS, model_file

QUESTION_TOKENS = {"hellaswag": 312, "boolq": 320, "gsm8k": 1200}
"""Tokens per question with all its choices, for estimates; about 100 in other tasks."""
State = Sequence[int]
Bits = np.ndarray[Any, Any]


def key(removed: State) -> str:
    """Return a state as part of a file name."""
    return "-".join(map(str, removed)) or "original"


def _counted(text: str) -> tuple[str, int]:
    """Parse ``TASK=N`` as (TASK, N), and ``N`` as ("each", N), which is for all other tasks."""
    task, _, count = text.rpartition("=")
    return task or "each", int(count)


class ModelStudy(Study):
    """Base class of a study of one model.

    Attributes:
        judged: names of the evaluation texts.
    """

    judged: ClassVar[tuple[str, ...]]
    settings = ("model", "length", "judged_tokens", "questions", "dtype", "seed")

    @classmethod
    def add_options(cls, add: Callable[..., Any]) -> None:
        add(
            "--model",
            default="smollm2",
            help="coder and gemma are downloaded with pip",
        )
        add("--data", type=Path, default=STUDIES.parents[1] / "shared" / "data")
        add("--dtype", default="auto")
        add("--batch-tokens", type=int, default=1024)
        add("--length", type=int, default=256, help="tokens of a sample")
        add("--judged-tokens", type=int, default=4096, help="of each text that judges")
        add("--questions", nargs="+", type=_counted, default=[], metavar="N|TASK=N")
        add("--seed", type=int, default=0)

    @cached_property
    def original(self) -> models.LoadedModel:
        name = self.options.model
        source = str(model_file(name)) if name in WHEELS else name
        return models.load(resolve(source), dtype=self.options.dtype)

    @property
    def replay(self) -> Replay:
        return self.original.replay

    @cached_property
    def texts(self) -> Texts:
        o = self.options
        return Texts(o.data, self.work, self.original.tokenizer, o.length)

    @cached_property
    def seconds(self) -> float:
        """Seconds per token of a forward pass of the original, fastest of three batches."""
        ids = torch.randint(8, 200, (4, self.options.length))
        taken = []
        with torch.inference_mode():
            for _ in range(3):
                began = time.perf_counter()
                self.original.model(ids, use_cache=False)
                taken.append(time.perf_counter() - began)
        return min(taken) / ids.numel()

    def working(self, journal: Path | None = None) -> Work:
        """Return the settings of a part's measurement."""
        return Work(self.options.batch_tokens, terminal, journal)

    def judged_text(self, name: str) -> TokenSet:
        return self.texts.judged(name, self.options.judged_tokens)

    def provenance(self) -> Content:
        """Return the versions, the model and the dtype that a results file was made with."""
        return {
            **versions(),
            "model": Path(self.options.model).name,
            "identity": model_identity(self.original.folder),
            "dtype": self.original.dtype_name,
        }

    # states that share their prefixes -----------------------------------------------------

    def rows(self, folder: str) -> Content:
        """Return the finished rows of a folder of parts, by the states' keys."""
        found: Content = {}
        for part in self.under(folder):
            found |= part["rows"]
        return found

    def _rest(
        self,
        folder: str,
        states: Iterable[State],
        make: Callable[[dict[str, State], Path], list[Content]],
        tokens: float,
    ) -> list[Part]:
        """Return one part for all states without a finished row; none if there are none."""
        known = self.rows(folder)
        rest = {key(s): s for s in states if key(s) not in known}

        def content(journal: Path) -> Content:
            return {"rows": dict(zip(rest, make(rest, journal), strict=True))}

        name = f"{folder}/{fingerprint(sorted(rest))[:12]}"
        return [Part(name, content, tokens * (0.2 + 0.45 * len(rest)))] if rest else []

    def losses(self, text: str, states: Iterable[State]) -> list[Part]:
        """Return parts that measure states' KL to the original and NLL, summed by sample."""

        def make(rest: dict[str, State], journal: Path) -> list[Content]:
            tokens = self.judged_text(text)
            wanted = states_of(len(self.replay), rest.values())
            found = measure(self.replay, tokens, wanted, self.working(journal))
            rows = zip(found.kl_sums, found.nll_sums, strict=True)
            return [loss_row(kl, nll, tokens) for kl, nll in rows]

        return self._rest(f"losses/{text}", states, make, self.options.judged_tokens)

    def answers(self, task: str, states: Iterable[State]) -> list[Part]:
        """Return parts that evaluate states on a task, all states in one run."""

        def make(rest: dict[str, State], journal: Path) -> list[Content]:
            found = score_states(
                self.original,
                self.prepared(task),
                [*rest.values()],
                self.working(journal),
            )
            return [self.answer_row(s) for s in found]

        return self._rest(f"answers/{task}", states, make, self.question_tokens(task))

    def question_tokens(self, task: str) -> float:
        """Return the estimated tokens to evaluate one model on a task."""
        return QUESTION_TOKENS.get(task, 100) * self.count(task)

    def count(self, task: str) -> int:
        """Return the number of questions that are used of a task."""
        counts = {"each": 500, **dict(self.options.questions)}
        return counts.get(task, counts["each"])

    def prepared(self, task: str) -> Any:
        return prepare_task(task, self.options.data, self.count(task))

    def answer_row(self, scores: Scores) -> Content:
        """Return right or wrong by question, with the metric and the dtype."""
        return {
            "metric": scores.metric.removesuffix(",none"),
            "dtype": self.original.dtype_name,
            "right": "".join("1" if r else "0" for r in scores.values),
        }


def loss_row(kl: Bits, nll: Bits, tokens: TokenSet) -> Content:
    """Return the losses summed by sample, and the number of predicted tokens of each sample."""
    counts = tokens.predicted.sum(1).tolist()
    return {"kl": kl.round(5).tolist(), "nll": nll.round(5).tolist(), "counts": counts}


def mean_loss(rows: Iterable[Content], what: str) -> float:
    """Return the mean loss over all texts, in nats per token."""
    found = list(rows)
    return float(
        sum(sum(r[what]) for r in found) / sum(sum(r["counts"]) for r in found)
    )
