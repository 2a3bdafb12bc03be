"""What the stages of a run share: the model (loaded when first needed), its blocks, its rows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isingcut import constraints as rows
from isingcut.config import RunConfig
from isingcut.constraints import LinearConstraint
from isingcut.errors import InfeasibleError, InputError
from isingcut.hamiltonian import Hamiltonian
from isingcut.problem import Problem
from isingcut.progress import Progress, silent

if TYPE_CHECKING:
    from isingcut.architectures.base import BlockStack
    from isingcut.blocks import Replay
    from isingcut.models import LoadedModel


class Session:
    """A model in use.

    Args:
        config: the run's options; only those about the model are used here.
        progress: where progress is shown.
    """

    def __init__(self, config: RunConfig, progress: Progress = silent) -> None:
        self.config, self.progress = config, progress

    @cached_property
    def source(self) -> Path:
        """The model as a local Hugging Face folder."""
        from isingcut.models import resolve

        return resolve(self.config.model, trust_remote_code=self.config.trust_remote_code)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Name and hash of the model."""
        from isingcut.models import model_identity

        return {**model_identity(self.source), "name": self.config.model}

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model in memory."""
        from isingcut.models import load

        return load(
            self.source,
            dtype=self.config.dtype,
            device=self.config.device,
            trust_remote_code=self.config.trust_remote_code,
        )

    @cached_property
    def stack(self) -> BlockStack:
        """The model's blocks."""
        from isingcut.architectures import find_stack

        return find_stack(self.loaded.model)

    @cached_property
    def replay(self) -> Replay:
        """The model's blocks, callable one at a time."""
        from isingcut.architectures import stack_modules
        from isingcut.blocks import Replay

        return Replay(self.loaded.model, stack_modules(self.loaded.model, self.stack))

    def describe_blocks(self) -> dict[str, Any]:
        """Blocks and legality rows as `run.json` keeps them, so that solving needs no model."""
        from isingcut.architectures import legality

        legal = legality(self.loaded.model.config, self.stack)
        return {
            "path": self.stack.path,
            "blocks": [dataclasses.asdict(b) for b in self.stack.blocks],
            "legality": [
                {
                    "name": r.name,
                    "coefficients": r.coefficients.tolist(),
                    "sense": r.sense,
                    "rhs": r.rhs,
                    "reason": r.reason,
                }
                for r in legal
            ],
        }


def removal_rows(
    blocks: dict[str, Any], remove: str, keep: str = "", drop: str = ""
) -> list[LinearConstraint]:
    """All constraints of one removal, for the blocks that `run.json` describes.

    Raises:
        InputError: the removal cannot be read, or removes no block or all of them.
        InfeasibleError: the constraints clash.
    """
    kinds = [b["kind"] for b in blocks["blocks"]]
    n = len(kinds)
    result = count_rows(kinds, remove)
    if keep:
        result += rows.keep(n, rows.parse_indices(keep))
    if drop:
        result += rows.drop(n, rows.parse_indices(drop))
    result += [LinearConstraint(**row) for row in blocks["legality"]]
    Problem(Hamiltonian(np.zeros(n), np.zeros((n, n))), result).check()
    return result


def count_rows(kinds: Sequence[str], remove: str) -> list[LinearConstraint]:
    """How many blocks go, in all or per kind."""
    n = len(kinds)
    whole = remove.strip()
    if not whole:
        raise InputError(f"--remove was not given; say how many of the {n} blocks to remove")
    if re.fullmatch(r"[+-]?\d+", whole):
        if not 1 <= int(whole) < n:
            raise InputError(
                f"--remove must be from 1 to {n - 1} for this model of {n} blocks, got {whole}"
            )
        return [rows.count(n, int(whole))]
    wanted = rows.parse_counts(whole)
    assert isinstance(wanted, dict)
    if not 1 <= sum(wanted.values()) < n:
        raise InputError(
            f"--remove must name 1 to {n - 1} blocks in all for this model of {n} blocks, "
            f"got {sum(wanted.values())} ({whole})"
        )
    return rows.kind_counts(kinds, wanted)


def make_problem(
    hamiltonian: Hamiltonian, blocks: dict[str, Any], remove: str, keep: str, drop: str
) -> Problem:
    """The constrained problem of one removal.

    Raises:
        InfeasibleError: the Hamiltonian is of another number of blocks, or the rows clash.
    """
    n = len(blocks["blocks"])
    if hamiltonian.n != n:
        raise InfeasibleError(
            f"the Hamiltonian is over {hamiltonian.n} blocks, the model has {n}; "
            "measure it again for this model"
        )
    return Problem(hamiltonian, removal_rows(blocks, remove, keep, drop))
