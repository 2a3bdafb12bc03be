"""Does our cut beat a published one, on the same weights and with the same repair?

The author of optipfair publishes google/gemma-3-270m without blocks 8, 9, 14 and 16 of 18, which
`--states` holds. Ours is the choice of a default run. Both are cut, patched (by least squares, and
as a run does by default, tuned) and healed from least squares, on the same text, order and number
of predictions. For other models give `--model` and `--methods isingcut before-last
block-influence`: the last blocks before the final one (arXiv 2403.17887), and ShortGPT's.

Figures of each METHOD, here `published`, and STAGE (cut, patched, healed):

METHOD_kl_over_ours_STAGE  KL to the original on all unseen texts, over that of our state; above 1
    is a win of ours. With a paired standard error, `_se`
METHOD_points_minus_ours_STAGE  right answers in points, the mean over tasks; below 0 is a win of
    ours. With half the paired 95 % interval, `_95`
"""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import ClassVar

import numpy as np

from isingcut import prune
from isingcut.energies.search import greedy_price
from studies.healing import summary
from studies.healing.study import Healing
from studies.healing.summary import OURS, paired, points
from studies.runner import Content, Part, read

NAMES = {"patched": "least_squares", "tuned": "patched"}
"""Names in figures of the stages of healing."""


class Published(Healing):
    """Study of a published state and ours."""

    name = "published"
    defaults: ClassVar[Content] = {
        "model": "gemma",
        "remove": [4],
        "methods": [OURS, "published"],
        "tuned": [OURS, "published"],
        "states": Path(__file__).with_name("gemma.json"),
        "tasks": ["arc_easy", "winogrande", "hellaswag", "lambada", "piqa"],
        "method": "lora",
        "rate": 1e-3,
        "steps": [16],
    }

    def choosing(self, method: str, m: int) -> Part:
        o = self.options
        if method != OURS or OURS in read(o.states).get(str(m), {}):
            return super().choosing(method, m)

        def make(_: Path) -> Content:
            out = self.work / f"run-{m}"
            run = prune(self.original.folder, m, out=out, dtype=o.dtype, seed=o.seed)
            return {"removed": sorted(run.chosen.removed)}

        price = greedy_price(len(self.replay), m) * 16 * o.length
        return Part(f"states/{OURS}/{m}", make, price)

    @staticmethod
    def show(content: Content) -> dict[str, float]:
        summary.show(content)
        figures = {}
        for rows in content["removals"].values():
            ours = rows.pop(OURS)["stages"]
            print(
                f"original: perplexity {exp(ours['cut']['pooled']['original_nll']):.2f}"
            )
            for method, row in rows.items():
                for stage, found in row["stages"].items():
                    name = NAMES.get(stage, stage.split()[0])
                    over = f"{method}_kl_over_ours_{name}"
                    minus = f"{method}_points_minus_ours_{name}"
                    figures[over], figures[f"{over}_se"] = kl_over(ours[stage], found)
                    figures[minus], figures[f"{minus}_95"] = points(
                        ours[stage]["accuracy"], found["accuracy"]
                    )
        return figures


def kl_over(first: Content, second: Content) -> tuple[float, float]:
    """Return the KL of a judged stage over that of another, and its paired standard error."""
    level = first["pooled"]["kl"]
    ratio = second["pooled"]["kl"] / level
    scaled = {
        name: {**text, "sample_kl": np.multiply(ratio, text["sample_kl"])}
        for name, text in first["texts"].items()
    }
    return ratio, paired(scaled, second["texts"], "kl")[1] / level
