"""Does the choice depend on luck? A search and its near candidates on ten calibration texts.

On each text isingcut searches, ranks and chooses with the defaults of a run. Then two questions:

1. Did the search stop too early? The same search is run without its stopping rule, up to `LONGER`
   times its budget.
2. Can near candidates be told apart? The three lowest of the ranking are all patched, as a run
   patches near candidates. They are evaluated, cut and patched, on unseen text: documents of
   WikiText-2, C4, conversations and Python files that are in no calibration text.

Gains are in the mean KL on the unseen texts, relative to the candidate of lowest mean KL on the
ranking text; standard errors are over calibration texts. Figures, with the `--prefix` in front:

stop_rule_regret_percent, _worst  mean and maximum over texts of the excess KL of the search's final
    state over that of the longer search, on the text of the search
tie_regret_percent_STAGE  gain of the lowest patched KL among the candidates within two paired
    standard errors of the lowest mean
near_gain_percent_STAGE  the same within two standard errors or 5 %, which is the rule of a run
patched_choice_gain_percent_STAGE  the same among all three
best_gain_percent_STAGE  gain of the lowest patched KL on the unseen text itself, an upper bound of
    the other patched gains
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar
from unittest import mock

import numpy as np

from isingcut.console.progress import terminal
from isingcut.data.calibration import Calibration
from isingcut.data.tokens import TokenSet
from isingcut.energies.search import Search, greedy_price, search
from isingcut.ising.states import states_of
from isingcut.measure.losses import measure
from isingcut.measure.packed import changed_losses
from isingcut.measure.work import Work
from isingcut.options.config import RunConfig
from isingcut.options.text import TEXT
from isingcut.processes import ALONE
from isingcut.runs import checks, cutting, measuring, pipeline, trials
from isingcut.runs.context import Context
from isingcut.runs.stages import Runner
from studies.runner import Content, Part
from studies.runner_models import ModelStudy, State, mean_loss

LONGER = 1.25
NEAR = trials.NEAR
STAGES = ("cut", "patched")
WEB = "calib_text/c4_300"


class Choice(ModelStudy):
    """Study of searches and near candidates on many calibration texts."""

    name = "choice"
    judged = ("wikitext2", "c4", "instruct", "code")
    defaults: ClassVar[Content] = {"judged_tokens": 2048}
    settings = (*ModelStudy.settings, "remove", "patch_tokens")

    @classmethod
    def add_options(cls, add: Callable[..., Any]) -> None:
        super().add_options(add)
        add("--remove", type=int, default=6, help="number of blocks")
        add("--texts", nargs="*", help="names of calibration texts; by default all")
        add("--patch-tokens", type=int, default=RunConfig().patch_tokens)
        add("--prefix", default="", help="of the names of figures")

    @cached_property
    def sources(self) -> dict[str, str]:
        """Calibration texts by name."""
        chats = self.texts.conversations()
        code = self.texts.trained_code()
        web = self.texts.halves(WEB)[0]
        books = self.options.data / "calib_text"
        return {
            "default": TEXT,
            "conversations": chats,
            "web pages": web,
            "maths": self.texts.problems(),
            "Python": code,
            "Wikipedia": "wiki",
            "four kinds": ",".join(
                f"{place}=0.25" for place in ("wiki", chats, web, code)
            ),
            "stories": str(books / "tinystories.jsonl"),
            "plays": str(books / "tinyshakespeare.jsonl"),
            "novel": str(books / "book_news_from_nowhere.jsonl"),
        }

    @cached_property
    def unseen(self) -> dict[str, TokenSet]:
        """Evaluation texts by name."""
        found = {name: self.judged_text(name) for name in self.judged}
        half = self.texts.samples(self.texts.halves(WEB)[1], self.options.judged_tokens)
        return {**found, "c4": half}

    def parts(self) -> list[Part]:
        o = self.options
        price = 4 * greedy_price(len(self.replay), o.remove) * o.length * 16
        return [
            Part(
                f"chosen/{o.remove}/{text}",
                lambda _, text=text: self._choose(text),
                price,
            )
            for text in o.texts or self.sources
        ]

    def _choose(self, text: str) -> Content:
        o = self.options
        options = {
            name: getattr(o, name)
            for name in ("length", "dtype", "patch_tokens", "seed")
        }
        config = RunConfig(
            model=str(self.original.folder),
            remove=str(o.remove),
            out=str(self.work / "runs" / f"{o.remove}-{text}"),
            calibration=self.sources[text],
            random_states=0,
            **options,
        )
        config = checks.resolve_energy(config.validate())
        fits = dict[tuple[int, ...], Any]()

        def fit_once(fit: cutting.Fit, removed: State, *given: Any) -> Any:
            found = fits.get(tuple(removed)) or cutting.fit_patch(fit, removed, *given)
            return fits.setdefault(tuple(removed), found)

        with (
            pipeline.open_run(config, terminal, ALONE, need_removal=True) as runner,
            # Patch all of the lowest three, so that the rules can choose among them.
            mock.patch.object(trials, "NEAR", math.inf),
            mock.patch.object(trials, "fit_patch", fit_once),
        ):
            longer = self._search_on(runner, config)
            (ranked,) = pipeline.measure_and_rank(runner, config)
            found = measuring.measure_energy(runner, config).meta["search"]
            made = found["targets"][str(o.remove)]
            rows = sorted(ranked.candidates, key=lambda row: row.kl)[: trials.TRIED]
            few = trials.trial_tokens(config)
            # A study that goes on after the ranking fits the patches again.
            context = runner.context
            fit = cutting.Fit(
                context, self._text(runner), tokens=few, share=config.patch_share
            )
            patches = [fit_once(fit, row.removed, terminal) for row in rows]
            near = [
                row.content() | {"unseen": self._judge(context, row.removed, new)}
                for row, new in zip(rows, patches, strict=True)
            ]
        return {
            "text": text,
            "ended": made["trace"][-1],
            "longer": longer,
            "near": near,
        }

    def _text(self, runner: Runner) -> Calibration:
        return Calibration.load(runner.folder.path / "calibration.safetensors")

    def _search_on(self, runner: Runner, config: RunConfig) -> Content:
        """Search without the stopping rule; the run's own search reuses the measurements."""
        context = runner.context
        folder = runner.folder
        samples = range(measuring.samples_of(config, config.energy))
        tokens = self._text(runner).splits["energy"].select(samples)
        work = context.work(folder.path / "hamiltonian.safetensors.journal")
        targets = measuring.targets_of(folder.run.blocks, config)
        longer = Search(context.replay, tokens, work, targets, seed=self.options.seed)
        longer.budget *= LONGER
        longer.evaluator.budget = longer.budget
        with mock.patch.object(search, "CHANCE", -1.0):
            return dict(longer.run().goals[0].trace[-1])

    def _judge(self, run: Context, removed: State, new: Any) -> Content:
        """Return a state's KL on unseen texts by sample, cut, and patched with ``new``."""
        state = states_of(len(run.replay), [removed])
        work = Work(run.batch_tokens)
        found = {}
        for name, text in self.unseen.items():
            cut = measure(run.replay, text, state, work).kl_sums[0]
            patched = changed_losses(
                run.replay, text, lambda name, _: new.get(name), work, name, removed
            )
            sums = {
                "counts": text.predicted.sum(1).numpy(),
                "cut": cut,
                "patched": patched,
            }
            found[name] = {
                stage: np.round(values, 5).tolist() for stage, values in sums.items()
            }
        return found

    def collect(self) -> Content:
        o = self.options
        settings = {name: getattr(o, name) for name in self.settings} | {
            "prefix": o.prefix
        }
        found = {"settings": settings, "provenance": self.provenance()}
        return {**found, "texts": self.under(f"chosen/{o.remove}")}

    @staticmethod
    def show(content: Content) -> dict[str, Any]:
        rows = content["texts"]
        o = content["settings"]
        print(f"\n{content['provenance']['model']} without {o['remove']} blocks")
        print(
            "text, passes of the search and of a longer one, KL above it; near candidates"
        )
        regrets = []
        gains = dict[str, list[Any]]()
        for row in rows:
            regrets.append(100 * (row["ended"]["kl"] / row["longer"]["kl"] - 1))
            passes = f"{row['ended']['passes']:.1f}, {row['longer']['passes']:.1f}"
            print(f"{row['text']:<15}{passes:>12}{regrets[-1]:>8.1f} %")
            unseen = [
                [_unseen(state, stage) for stage in STAGES] for state in row["near"]
            ]
            rules = _rules(row["near"])
            for i, (state, judged) in enumerate(zip(row["near"], unseen, strict=True)):
                by = ", ".join(rule for rule, chosen in rules.items() if chosen == i)
                print(
                    f"{'':6}{' '.join(map(str, state['removed'])):<40}{state['kl']:.3f} (+- "
                    f"{state['above_lowest_se']:.3f}), patched {state['patched_kl']:.3f}; unseen "
                    f"{judged[0]:.3f}, patched {judged[1]:.3f}  {by}"
                )
            rules["best_gain"] = int(np.argmin([patched for _, patched in unseen]))
            for rule, i in rules.items():
                gains.setdefault(rule, []).append(
                    100 * (1 - np.divide(unseen[i], unseen[0]))
                )
        figures = {"stop_rule_regret_percent": float(np.mean(regrets))}
        figures["stop_rule_regret_percent_worst"] = max(regrets)
        for rule, found in gains.items():
            table = np.array(found)
            for stage, column in zip(STAGES, table.T, strict=True):
                name = f"{rule}_percent_{stage}"
                figures[name] = float(column.mean())
                if len(column) > 1:
                    figures[f"{name}_se"] = float(
                        column.std(ddof=1) / len(column) ** 0.5
                    )
        return {o["prefix"] + name: value for name, value in figures.items()}


def _unseen(state: Content, stage: str) -> float:
    """Return the mean KL over the evaluation texts."""
    return float(
        np.mean([mean_loss([text], stage) for text in state["unseen"].values()])
    )


def _rules(near: list[Content]) -> dict[str, int]:
    """Return the index of each rule's choice; candidates are sorted by KL, the lowest first."""
    above = [row["kl"] - near[0]["kl"] for row in near]
    errors = [trials.ERRORS * row["above_lowest_se"] for row in near]
    level = [i for i, gap in enumerate(above) if gap <= errors[i]]
    close = [
        i for i, gap in enumerate(above) if gap <= max(errors[i], NEAR * near[0]["kl"])
    ]

    def patched(i: int) -> float:
        return float(near[i]["patched_kl"])

    found = {
        "tie_regret": min(level, key=patched),
        "near_gain": min(close, key=patched),
    }
    found["patched_choice_gain"] = min(range(len(near)), key=patched)
    return found
