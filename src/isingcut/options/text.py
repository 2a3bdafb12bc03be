"""Options of the text that a run measures on."""

from __future__ import annotations

from dataclasses import dataclass

from isingcut.options import parsed
from isingcut.options.declaration import Options, option

TEXT = "wiki=0.75,python=0.25"
"""Prose and code, available without a network. A patch fitted on prose alone makes code worse."""


@dataclass(frozen=True, init=False)
class TextOptions(Options):
    """Which text, how much of it, and the seed of every draw."""

    calibration: str = option(
        TEXT,
        "Calibration text: a .txt, .jsonl, .json or .csv file (also .gz); - for standard input; a "
        "datasets name; 'web', 'instruct' or 'maths' from the hub; 'wiki'; 'python' (standard "
        "library code); 'manual' (Python's manual); 'chat' (conversations that the model writes); "
        "or 'self' (text that the model writes). "
        "answers:SOURCE counts only the assistant's tokens of a chat. Mix sources by their share "
        "of tokens: wiki=0.75,python=0.25.",
        stages="calibration",
    )
    samples: parsed.Count | None = option(
        None,
        "Samples that --energy is measured on (default: set by --energy).",
    )
    length: parsed.Length = option(
        256,
        "Tokens per sample.",
        stages="calibration",
    )
    rank_samples: parsed.Few = option(
        16,
        "Further samples, to rank the candidates on.",
        stages="calibration",
    )
    report_samples: parsed.Few = option(
        32,
        "Unseen samples, for the reported perplexity.",
        stages="calibration",
    )
    seed: parsed.Seed = option(
        0,
        "Random seed.",
        stages="calibration energy pack solve rank baseline evaluate",
    )
