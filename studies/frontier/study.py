"""Cutting and quantising combined: SmolLM2 in llama.cpp's types, whole and without some blocks.

The source is the package's Q4_1 file, unpacked to F16. The product cuts and patches it
(`excise --gguf`, the default patch); llama.cpp quantises the result and measures every file: KL to
the whole F16 file and perplexity, on C4 and on Wikipedia leads that nothing was chosen or fitted
on; prefill and decode on one thread, in tokens per second of processor time. Every round times all
files in turn. A rate is the median over rounds of its ratio to that of the whole F16 file in the
same round. In the other order (`-last`), the whole quantised file is cut and patched. The best
files by a key are those that no other file equals or beats in both the key and KL.

`bash studies/clients/environments.sh FOLDER` builds llama.cpp; `PYTHONPATH` must name the folder
`FOLDER/llama/lib/python3.X/site-packages`. Figures:

frontier_points  number of files with KL, perplexity, bytes and both rates
frontier_bits_of_cut  size of the largest cut file among the best by bytes, in bits per weight of
  the whole model
frontier_order  KL of quantise, cut, patch over that of cut, patch, quantise; 6 blocks removed, Q4_0
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.data.calibration import TextSampler, build
from studies.clients.models import packed_model
from studies.frontier import llama
from studies.runner import Content, Part
from studies.runner_models import ModelStudy, State, key

TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
STATES: Sequence[State] = (
    (),
    (16, 17),
    (14, 16, 17, 18),
    range(13, 19),
    (5, *range(12, 19), 26),
)
"""Removed blocks: the lowest states that searches on this model found."""
LAST = "-last"
ROUNDS = 3
FILES = [(s, t) for t in TYPES for s in STATES]
WEIGHTS = 134_515_008
KV_BYTES = 2 * 3 * 64 * 2
"""Weights of the whole model; bytes per token and block: keys and values, 3 heads, 64 float16."""
KEYS = {"bytes": 1, "decode": -1, "prefill": -1, "memory_4k": 1, "memory_32k": 1}
"""Keys to compare files by; 1: lower is better, -1: higher is better."""


def best_files(points: Sequence[Content], name: str) -> list[Content]:
    """Return the files that no other equals or beats in key and KL, best in the key first."""
    found: list[Content] = []
    for point in sorted(points, key=lambda p: (KEYS[name] * p[name], p["kl"])):
        found += [point] if not found or point["kl"] < found[-1]["kl"] else []
    return found


def show(content: Content) -> dict[str, Any]:
    """Print all files and the best of them by each key; return the figures."""
    points = sorted(
        content["points"], key=lambda p: (-p["blocks"], -p["bytes"], p["type"])
    )
    for p in points:
        print(
            *(f"{v:.4f}" if isinstance(v, float) else v for v in p.values()), sep=" | "
        )
    timed = [p for p in points if "decode" in p]
    for name in KEYS:
        print(
            f"{name}:", *(f"{p['blocks']}/{p['type']}" for p in best_files(timed, name))
        )
    cut = [p["bytes"] for p in best_files(timed, "bytes") if p["blocks"] < 30]
    kl = {p["type"]: p["kl"] for p in points if p["blocks"] == 24}
    figures = {
        "frontier_points": len(timed),
        "frontier_bits_of_cut": 8 * max(cut) / WEIGHTS,
    }
    return figures | {"frontier_order": kl.get(f"Q4_0{LAST}", np.nan) / kl["Q4_0"]}


class Frontier(ModelStudy):
    """Study of every state in every type."""

    name = "frontier"

    def parts(self) -> list[Part]:
        files = [*FILES, (STATES[3], f"Q4_0{LAST}")]
        found = [
            Part(f"point/{key(s)}/{t}", partial(self._measure, s, t)) for s, t in files
        ]
        return found + [Part(f"speed/{i}", self._time) for i in range(ROUNDS)]

    @cached_property
    def samples(self) -> list[list[int]]:
        """Wikipedia leads of a run's report text, then as many samples of C4."""
        sampler = TextSampler(self.original.tokenizer, 256, 0)
        sizes = {"samples": 16, "rank_samples": 16, "report_samples": 32}
        made = build("wiki=0.75,python=0.25", sampler, **sizes)
        leads = made.splits["report"]
        web = self.judged_text("c4").rows
        found = [
            r for r, part in zip(leads.rows, leads.parts, strict=True) if part == "wiki"
        ]
        return found[: len(web)] + web

    def _file(self, removed: State, name: str) -> Path:
        return self.work.absolute() / f"{key(removed)}-{name}.gguf"

    def _cut(self, model: str | Path, removed: State, whole: Path, out: Path) -> None:
        """Cut and patch a file as the product does."""
        folder = self.work / f"run-{Path(model).stem}"
        energy = ("energy", model, "--energy", "empirical-fisher", "--out", folder)
        where = ("--remove", len(removed), "--blocks", ",".join(map(str, removed)))
        for words in (energy, ("excise", folder, *where, "--gguf", whole)):
            subprocess.run(
                [sys.executable, "-m", "isingcut", *map(str, words)], check=True
            )
        (folder / f"remove-{len(removed)}" / "model.gguf").rename(out)

    def _measure(self, removed: State, name: str, _: Path) -> Content:
        whole = self._file((), name.removesuffix(LAST))
        out = self._file(removed, name)
        if removed and name == "F16":
            self._cut(self.options.model, removed, whole, out)
        elif name.endswith(LAST):
            self._cut(whole, removed, whole, out)
        else:
            source = packed_model() if name == "F16" else self._file(removed, "F16")
            llama.quantise(source, name, out)
        found = llama.measure(out, self.samples, self.work / "reference.f32")
        kl, nll = np.mean(found, 0)
        errors = np.std(found, 0, ddof=1) / len(found) ** 0.5
        blocks = 30 - len(removed)
        size = out.stat().st_size
        ppl = float(np.exp(nll))
        row = {f"memory_{k}k": size + k * 1024 * KV_BYTES * blocks for k in (4, 32)}
        row |= {
            "kl": float(kl),
            "kl_se": errors[0],
            "ppl": ppl,
            "ppl_se": ppl * errors[1],
        }
        row = {"blocks": blocks, "type": name, "bytes": size, **row}
        return {"rows": {f"{blocks}/{name}": row}, "losses": found}

    def _time(self, _: Path) -> Content:
        files = {f"{30 - len(s)}/{t}": self._file(s, t) for s, t in FILES}
        rates = llama.measure_speed([*files.values()], self.samples[0])
        return {"rates": dict(zip(files, rates, strict=True))}

    def collect(self) -> Content:
        points = self.rows("point")
        rounds = [part["rates"] for part in self.under("speed")]
        for name in rounds[0]:
            ratios = np.median([np.divide(r[name], r["30/F16"]) for r in rounds], 0)
            points[name] |= zip(("prefill", "decode"), ratios.tolist(), strict=True)
        rates = np.median([r["30/F16"] for r in rounds], 0).tolist()
        return {
            "provenance": self.provenance(),
            "rates": rates,
            "points": [*points.values()],
        }

    show = staticmethod(show)
