"""How far two models' logits are apart, and how far rounding explains."""

from __future__ import annotations

import torch

_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_HALF_TOLERANCE = 2e-2


def tolerance(dtype: torch.dtype) -> float:
    """Largest `relative_difference` of logits that a dtype's rounding explains."""
    return _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def relative_difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Largest difference of two tensors, each entry's relative to its own size or the usual one.

    Relative to the larger of the two, because rounding grows with an entry, and an entry near 0
    is a sum of usual ones. The usual size is taken at each position alone, as `usual_size` says.
    The largest entry is no scale: masked logits hold the smallest float, and beside them no
    difference is large.

    Args:
        expected, got: (..., V); positions first, logits or channels last.

    Returns:
        0 where all is equal, masked entries and infinities included; infinite for other shapes,
        where either holds NaN, and where only one is infinite.
    """
    if expected.shape != got.shape:
        return float("inf")
    this, that = (x.detach().cpu().double().flatten(0, -2) for x in (expected, got))
    size = torch.maximum(this.abs(), usual_size(this))
    ratio = ((this - that).abs() / size).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(ratio.masked_fill(this == that, 0.0).max())


def usual_size(logits: torch.Tensor) -> torch.Tensor:
    """(P, 1) median size of the entries at each of P positions, (P, V) in.

    Entries that are the same at every position are not computed from the text (masks, padding of
    the vocabulary) and do not count, where any differ; nor do infinite ones. Further entries may
    be as large as they like, as long as they are fewer than half.
    """
    differ = (logits != logits[:1]).any(0)
    counted = logits.isfinite() & (differ | ~differ.any())
    return logits.abs().masked_fill(~counted, float("nan")).nanmedian(-1, keepdim=True).values
