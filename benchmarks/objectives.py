"""What should be minimised? Which loss on which text goes with the questions a cut model answers.

    python benchmarks/objectives.py --plan            # what is left to do, in minutes
    python benchmarks/objectives.py [--minutes 600]   # do it
    python benchmarks/objectives.py --collect         # finished parts -> results/objectives.json
    python benchmarks/objectives.py --summary         # its table and figures

Many states of one model with the same number of blocks removed: by default those that all methods
chose in `results/quality.json`, and exchanges of one or two blocks of three of them; of another
model (`--model coder`: the one of `accuracy.py`) runs of blocks and exchanges in them. Each is
measured on each text (KL to the original and NLL, nats a token) and asked the questions of each
task, as `isingcut run --tasks` asks them. Some of them, evenly spread over their order by KL, are
repaired as well and asked again: with the fitted patch, and after `--steps` of healing.
The work is cut into parts, one file each in `--work`.

Figures, over the states; `coder_` before them for the second model:

objective_spearman_NAME  Spearman's rank correlation of the mean accuracy over the tasks with the
  negative of a loss: KL or NLL (`nll_`) on a text, or the KL on a mixture of texts. 1 orders the
  states as the questions do. Intervals are of 2,000 bootstrap samples over states and questions
patched_spearman_NAME, healed_spearman_NAME  of the repaired states: the accuracy then with the loss
  of the cut state, which is what a choice goes by; own_NAME instead of NAME: with the KL of the
  repaired state itself, on texts that no repair has seen; cut_accuracy: with that of the cut state
reliability  the same between the accuracies on two halves of the questions (mean of 200 splits),
  taken to all of them by Spearman's and Brown's formula: no objective can be expected beyond
  about its square root
half_spearman_scores, half_spearman_certainties  the rank correlation of the accuracy on half of the
  questions with the accuracy, and with the log-probability of right answers, on the other half
default_objective  the mixture of the highest correlation

The tables say by how much each objective is above the mixture that a run takes by default, paired
over the same bootstrap samples; the second is of the half of the states of the lowest KL, among
which a search chooses.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from _coder_model import coder_file
from _objectives_repair import Repairs
from _objectives_states import chosen_states, windows
from _objectives_summary import KIND, TASKS, collect, show, spread
from _parts_command import TASK_TOKENS, add_working, bits, obey, parser_of, results_of
from _quality_store import Part, Price, Speed, Stage, Store, drive, show_plan
from isingcut.console.progress import silent, terminal
from isingcut.data.calibration import build
from isingcut.data.tokens import TokenSet
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import Asked, score_states
from isingcut.ising.states import states_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models import load as models
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.replay import Replay
from isingcut.models.sources import model_identity, resolve

CONVERSATIONS = 300
"""The last of the instruction mix."""


class Study:
    """The model, its states, the texts and the questions.

    Args:
        options: the command line's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.data, self.work = options, Path(options.data), Path(options.work)
        self.folder = resolve(str(coder_file()) if options.model == "coder" else options.model)
        keys = (
            *("remove", "states", "tokens", "questions", "dtype"),
            *("patch_tokens", "method", "steps", "rate"),
        )
        settings = {k: getattr(options, k) for k in keys}
        self.store = Store(
            self.work, {"model_sha256": model_identity(self.folder)["sha256"], **settings}
        )

    @cached_property
    def loaded(self) -> models.LoadedModel:
        return models.load(self.folder, dtype=self.options.dtype)

    @cached_property
    def replay(self) -> Replay:
        return Replay(
            self.loaded.model, stack_modules(self.loaded.model, find_stack(self.loaded.model))
        )

    @cached_property
    def states(self) -> list[list[int]]:
        o = self.options
        drawn = chosen_states if o.model == "smollm2" else windows
        return drawn(o.remove, o.states, len(self.replay))

    def working(self, journal: Path) -> Work:
        return Work(1024, silent if self.options.quiet else terminal, journal)

    # texts --------------------------------------------------------------------------------

    @cached_property
    def texts(self) -> dict[str, Callable[[], TokenSet]]:
        """Token sets by the name of the text."""
        data, texts = self.data, self.data / "calib_text"

        def mix() -> Path:
            lines = (data / "calib_instruct/mix1000.jsonl").read_text(encoding="utf-8")
            return self.written("instruct", lines.splitlines()[-CONVERSATIONS:])

        def running(source: str) -> Callable[[], TokenSet]:
            return lambda: self.built(source)

        return {
            "web": running(str(texts / "c4_300.jsonl")),
            "wiki": running(str(texts / "wiki_demo.jsonl")),
            "stories": running(str(texts / "tinystories.jsonl")),
            "python": running("python"),
            "instruct": lambda: self.built(str(mix())),
            "answers": lambda: self.built(f"answers:{mix()}"),
            "maths": lambda: self.built(str(self.problems("gsm8k/train1000", "solution", 1))),
            "qa": lambda: self.built(str(self.problems("arc_challenge/dev", "choices", 8))),
        }

    def built(self, source: str) -> TokenSet:
        found = build(
            source,
            self.loaded.tokenizer,
            samples=self.options.tokens // 256,
            rank_samples=1,
            report_samples=1,
            length=256,
            seed=0,
        )
        return found.splits["energy"]

    def problems(self, file: str, answer: str, together: int) -> Path:
        """Questions with their right answers as running text, some to a document."""
        rows = [
            json.loads(line)
            for line in (self.data / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        texts = [
            f"Question: {r['context']}\nAnswer: "
            + (r["choices"][r["answer"]] if answer == "choices" else r[answer])
            for r in rows
        ]
        groups = ["\n".join(texts[i : i + together]) for i in range(0, len(texts), together)]
        return self.written(file.replace("/", "-"), [json.dumps({"text": t}) for t in groups])

    def written(self, name: str, lines: list[str]) -> Path:
        path = self.work / "text" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    # parts --------------------------------------------------------------------------------

    def losses(self, text: str) -> Part:
        """Of every state on one text."""

        def make(journal: Path) -> dict[str, Any]:
            tokens, work = self.texts[text](), self.working(journal)
            found = measure(
                self.replay,
                tokens,
                states_of(len(self.replay), [tuple(s) for s in self.states]),
                batch_tokens=work.batch_tokens,
                progress=work.progress,
                description=f"{len(self.states)} states on {text}",
                journal=journal,
            )
            return {
                "text": text,
                "states": self.states,
                "counts": found.counts.tolist(),
                "kl_sums": found.kl_sums.round(4).tolist(),
                "nll_sums": found.nll_sums.round(4).tolist(),
            }

        states = self.options.states
        return Part(f"losses/{text}", make, (Price(self.options.tokens, 0.45 * states, states),))

    def asking(self, task: str) -> Part:
        """Right and wrong of the original and of every state."""

        def make(journal: Path) -> dict[str, Any]:
            states = [[], *self.states]
            prepared = prepare_task(task, self.data, self.options.questions)
            model = Asked(self.loaded, self.replay)
            found = score_states(model, prepared, states, self.working(journal))
            return {
                "task": task,
                "states": states,
                "right": [bits(s.values) for s in found],
                "certainties": [s.certainties.round(3).tolist() for s in found],
            }

        price = Price(TASK_TOKENS[task] * self.options.questions, 0.45 * self.options.states, 2)
        return Part(f"tasks/{task}", make, (price,))

    @cached_property
    def repairs(self) -> Repairs:
        return Repairs(self)

    def repairing(self) -> list[Part]:
        """States spread evenly over the order of all by their KL."""
        o = self.options
        if not all(self.store.done(f"losses/{text}") for text in self.texts):
            return []
        kl = [self.store.read(f"losses/{text}")["kl_sums"] for text in self.texts]
        found = []
        for i in spread(np.sum([np.sum(rows, axis=1) for rows in kl], 0), o.repaired):
            state = self.states[i]
            name = f"repaired/{'-'.join(map(str, state))}"
            # A pass forward for the teacher, three for the student; the answers twice.
            asked = 2 * o.questions * sum(TASK_TOKENS[task] for task in o.tasks)
            price = Price(4 * o.steps * 2048 + 6 * o.patch_tokens + asked, 1, 1)
            found.append(Part(name, lambda _, state=state: self.repairs.make(state), (price,)))
        return found

    def stages(self) -> list[Stage]:
        return [
            Stage("losses", lambda: [self.losses(text) for text in self.texts]),
            Stage("tasks", lambda: [self.asking(task) for task in self.options.tasks]),
            Stage("repaired", self.repairing),
        ]

    def speed(self) -> Speed:
        """A rough one: 0.5 ms a token and 135M parameters, the head a quarter of it."""
        size = sum(p.numel() for p in self.loaded.model.parameters()) / 135e6
        return Speed(0.0005 * size, 0.00012 * size)


def parser() -> argparse.ArgumentParser:
    found = parser_of(__doc__)
    add = found.add_argument
    add("--model", default="smollm2")
    add("--remove", type=int, default=6)
    add("--states", type=int, default=44, help="of so many states")
    add("--tokens", type=int, default=2560, help="of each text")
    add("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    add("--questions", type=int, default=500, help="of each task")
    add("--repaired", type=int, default=16, help="of so many of the states")
    add("--patch-tokens", type=int, default=16384, help="that their patch is fitted on")
    add("--method", default="full", help="of healing them: full, lora or last:N")
    add("--steps", type=int, default=20, help="of 8 samples of 256 tokens")
    add("--rate", type=float, default=3e-4, help="highest learning rate")
    add("--dtype", default="auto")
    words = "default: results/objectives.json; of the coder objectives_coder.json"
    add_working(found, "objectives", words)
    return found


def work(study: Study) -> None:
    """Show what is left, and do it."""
    o, stages, speed = study.options, study.stages(), study.speed()
    planned = show_plan(stages, study.store, speed, parts=o.plan)
    if not o.plan:
        drive(stages, study.store, speed, only=o.only, minutes=o.minutes, planned=planned)


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    paths = results_of(options, "objectives")
    obey(options, paths, KIND, show, lambda: Study(options), collect, work)


if __name__ == "__main__":
    main()
