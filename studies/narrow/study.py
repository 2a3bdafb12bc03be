"""Does a patch that is fitted on a narrow text harm other text?

Five narrow texts (recipes, laws, chat logs, German, code of one project) are calibrated on. The
same blocks are removed in each case, because the choice is not the subject. The default patch is
fitted and tuned on the text of a run, with a share of the default text in it. The exact cut and the
patched model are judged on documents of the narrow text that nothing was fitted on, and on
`UNLIKE`, as a run judges them. Figures, `_S` for a share of S percent:

patch_harms_unlike_text_S  number of texts on which the patched model is worse on the unlike text
    than the exact cut, by more than two paired standard errors
unlike_kl_change_S, own_kl_change_S  mean over texts of KL patched - KL cut, on either text
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from isingcut.data.calibration import Calibration, build
from isingcut.data.corpora import UNLIKE
from isingcut.data.healing_text import to_fit
from isingcut.data.tokens import TokenSet
from isingcut.formats.architectures.blocks import find_stack
from isingcut.healing.job import Job
from isingcut.healing.repairs.base import make_patches
from isingcut.ising.states import Floats, states_of
from isingcut.measure.losses import difference, measure
from isingcut.measure.packed import changed_losses
from isingcut.options.config import HealConfig, RunConfig
from studies.narrow.texts import NAMES, write_text
from studies.runner import Content, Part, numbers
from studies.runner_models import ModelStudy


class Narrow(ModelStudy):
    """Study of patches that are fitted on narrow texts."""

    name = "narrow"
    judged = ()
    defaults: ClassVar[Content] = {"length": 128, "judged_tokens": 2048}
    settings = (*ModelStudy.settings, "removed", "patch_tokens")

    @classmethod
    def add_options(cls, add: Callable[..., Any]) -> None:
        super().add_options(add)
        add("--removed", type=numbers, default=[13, 14, 15, 16, 17, 18])
        add("--patch-tokens", type=int, default=RunConfig().patch_tokens)
        add("--shares", nargs="*", type=float, default=[0.0, 0.25, 0.5, 0.75])

    def calibration(self, source: str) -> Calibration:
        """Return the splits of a text."""
        o = self.options
        return build(
            source,
            self.original.tokenizer,
            samples=8,
            rank_samples=8,
            report_samples=o.judged_tokens // o.length,
            length=o.length,
            seed=o.seed,
        )

    @cache  # noqa: B019
    def judged_cut(self, source: str) -> tuple[TokenSet, Floats, dict[int, Any]]:
        """Return the report split of a text, the exact cut's KL by sample, and what to keep."""
        tokens = self.calibration(source).splits["report"]
        state = [self.options.removed]
        found = measure(
            self.replay, tokens, states_of(len(self.replay), state), self.working()
        )
        return tokens, found.kl_sums[0], {}

    def parts(self) -> list[Part]:
        o = self.options
        return [
            Part(
                f"{text}/{share}",
                lambda _, text=text, share=share: self._judge(text, share),
                6 * o.patch_tokens + 6 * o.judged_tokens,
            )
            for share in o.shares
            for text in NAMES
        ]

    def _judge(self, text: str, share: float) -> Content:
        """Fit a patch, and return the KL by sample as cut and as patched, on both texts."""
        o = self.options
        replay = self.replay
        work = self.working()
        used = self.calibration(str(write_text(text, self.work)))
        fitted, record = to_fit(
            used, self.original.tokenizer, o.patch_tokens, share=share
        )
        config = HealConfig(
            patch="tuned", patch_tokens=o.patch_tokens, batch_tokens=o.batch_tokens
        )
        job = Job(
            self.original,
            tuple(o.removed),
            Path(),
            fitted,
            self.work,
            config,
            work.progress,
        )
        patches = make_patches(job).patches
        new = {}
        blocks = find_stack(self.original.model).blocks
        for p in patches:
            layer = f"{blocks[p.block].path}.{p.path}"
            new |= {f"{layer}.{name}": value for name, value in p.parameters.items()}
        found: Content = {"text": text, "share": share, "fitted": record.content()}
        for name, source in (("own", used.source), ("unlike", UNLIKE)):
            tokens, cut, kept = self.judged_cut(source)
            patched = changed_losses(
                replay,
                tokens,
                lambda name, _: new.get(name),
                work,
                name,
                o.removed,
                kept,
            )
            sums = {"counts": tokens.counts, "cut": cut, "patched": patched}
            found[name] = {key: np.round(row, 5).tolist() for key, row in sums.items()}
        return found

    def collect(self) -> Content:
        settings = {name: getattr(self.options, name) for name in self.settings}
        rows = [row for text in NAMES for row in self.under(text)]
        return {"settings": settings, "provenance": self.provenance(), "rows": rows}

    @staticmethod
    def show(content: Content) -> dict[str, Any]:
        print(
            "text, share of the default text, tokens fitted on; KL as cut -> patched, own, unlike"
        )
        figures: dict[str, Any] = {}
        changes: dict[str, list[float]] = {}
        for row in content["rows"]:
            share = f"{100 * row['share']:.0f}"
            line = f"{row['text']:<10}{row['share']:>6.2f}"
            line += f"{row['fitted']['tokens']:>8,}"
            for name in ("own", "unlike"):
                cut, patched, counts = (
                    np.array(row[name][k]) for k in ("cut", "patched", "counts")
                )
                change, error = difference(cut, patched, counts)
                changes.setdefault(f"{name}_kl_change_{share}", []).append(change)
                line += f"  {cut.sum() / counts.sum():.3f} -> {patched.sum() / counts.sum():.3f}"
                line += f" ({change:+.3f} +- {error:.3f})"
            harm = change > 2 * error
            harms = f"patch_harms_unlike_text_{share}"
            figures[harms] = figures.get(harms, 0) + harm
            print(line + "  harm" * harm)
        return figures | {
            name: float(np.mean(found)) for name, found in changes.items()
        }
