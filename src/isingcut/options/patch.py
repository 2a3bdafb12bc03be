"""Options of the patch and of the cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval as Bounds

from isingcut.options import parsed
from isingcut.options.declaration import option
from isingcut.options.text import TextOptions


@dataclass(frozen=True, init=False)
class PatchOptions(TextOptions):
    """How the layers next to a cut are repaired, and what else is left out."""

    patch: str = option(
        "tuned",
        "linear: fold a least-squares map into the block before each cut, where possible. tuned: "
        "linear, then train the layers next to the cuts for a few steps (not with --heal, which "
        "trains all layers). none: no patch.",
        stages="rank",
    )
    patch_tokens: parsed.PatchTokens = option(
        65536,
        "Tokens to fit the patch on: the samples of --energy first, then further text.",
        stages="pack rank cut",
    )
    patch_share: Annotated[float, Bounds(ge=0, le=1)] = option(
        0.5,
        "Share of --patch-tokens from the default text, if --calibration is of other text only: "
        "it keeps the patch from harming other text (0: your text alone).",
        stages="pack rank cut",
    )
    drop_mtp: bool = option(
        False,
        "Leave out the layers for multi-token prediction (MTP); without it they are kept.",
        stages="cut gguf",
    )
