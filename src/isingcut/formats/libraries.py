"""Silence libraries that load files, and convert their errors and invalid results to one line."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.errors import CheckpointError, IsingcutError, ModelError, one_line
from isingcut.formats.transformers_private import KERNEL_LOGGER
from isingcut.memory import raise_if_exhausted

if TYPE_CHECKING:
    import torch


_PIECE = 1 << 20


@contextlib.contextmanager
def catch_errors(what: str) -> Iterator[None]:
    """Convert all errors of a library within the context to one that names what was read.

    A configuration, a tokenizer or a file can make a library fail in any way.

    Args:
        what: name of what is read, for example ``"the tokenizer in my-model"``.

    Raises:
        ModelError: the library failed; other errors as in `convert_errors`.
    """
    failed = convert_errors(ModelError, f"cannot load {what}")
    with failed, quiet_transformers(), warnings.catch_warnings(action="ignore"):
        yield


@contextlib.contextmanager
def convert_errors(kind: type[IsingcutError], what: str) -> Iterator[None]:
    """Convert all errors within the context to one of ``kind``, whose message begins with ``what``.

    Raises:
        MemoryExhaustedError: there is not enough memory. Errors of isingcut and of a device are not
            converted either.
    """
    try:
        yield
    except BaseException as error:
        name = type(error).__name__
        ours = name == "AcceleratorError" or isinstance(error, IsingcutError)
        # A panic of a library written in Rust is not an `Exception`.
        if ours or not (isinstance(error, Exception) or name == "PanicException"):
            raise
        raise_if_exhausted(error)
        words = one_line(error)
        if "trust_remote_code=True" in str(error):
            words = (
                "it needs its own Python code; read its .py files, and if you trust them, pass "
                "--trust-remote-code"
            )
        raise kind(f"{what}: {words}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off transformers' progress bars and warnings within the context."""
    from transformers.utils import logging

    hf_logging: Any = logging
    bars = hf_logging.is_progress_bar_enabled()
    level = hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def report_missing_kernels() -> None:
    """Let transformers say, also where it is quiet, which packages would bring faster kernels."""
    logging.getLogger(KERNEL_LOGGER).setLevel(logging.WARNING)


def explain_shape(
    name: str, folder: Path, stored: Sequence[int], wanted: Sequence[int]
) -> str:
    """Return the message that a tensor has another shape than the model's."""
    return (
        f"the tensor {name} in {folder} has the shape {list(stored)}, but its model expects "
        f"{list(wanted)}; the config and the weights do not belong together"
    )


def refuse_incomplete(report: Mapping[str, Any], source: Path) -> None:
    """Raise if transformers replaced tensors of a model by random numbers.

    Args:
        report: transformers' loading info (``output_loading_info``).
        source: file or folder that the model was loaded from.

    Raises:
        ModelError: a tensor is missing or has another shape; the message names it.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} tensors of its architecture, first "
            f"{missing[0]}; the config and the weights do not belong together"
        )
    for name, there, wanted in sorted(report["mismatched_keys"]):
        raise ModelError(explain_shape(name, source, there, wanted))


def refuse_infinite(tensors: Iterable[tuple[str, torch.Tensor]], source: Path) -> None:
    """Raise if weights are NaN or infinite, because every loss would then be invalid.

    Raises:
        CheckpointError: a tensor has NaN or infinity; the message names it.
    """
    import torch

    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            continue
        # The sum of finite numbers may overflow, so each is checked if the sum is not finite.
        numbers: Any = tensor.detach()
        total = numbers.sum(dtype=torch.float32)
        if not torch.isfinite(total) and not all(
            bool(torch.isfinite(part).all()) for part in numbers.flatten().split(_PIECE)
        ):
            raise CheckpointError(
                f"the tensor {name} in {source} has NaN or infinite values; download the weights "
                "again, or use the checkpoint of an earlier training step"
            )
