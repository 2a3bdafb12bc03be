"""Detect out-of-memory errors, of the machine or of a GPU, among the errors of any library.

No library is imported for this, so that `isingcut --help` stays fast.
"""

import contextlib
import errno
import re
from collections.abc import Iterator

from isingcut.errors import MemoryExhaustedError

_WORDS = re.compile(
    "(?i)out of memory|not enough memory|(?:can't|cannot) allocate|_ALLOC_FAILED"
)
_WANTED = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGTPE]iB)")
_CAPACITY = re.compile(r"total capacity of ([\d.]+) ?(bytes|[KMGTPE]iB)")
_ON_GPU = re.compile("OutOfMemoryError|CUDA|CUBLAS|CUDNN|HIP|MPS")


def is_memory_exhausted(error: BaseException) -> bool:
    """Whether an error reports that the machine or a GPU is out of memory."""
    names = {c.__name__ for c in type(error).__mro__}
    if names & {"MemoryError", "MemoryExhaustedError", "OutOfMemoryError"}:
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # Torch and safetensors also raise general errors, which can be identified by their text only.
    return bool(
        names & {"RuntimeError", "SafetensorError"} and _WORDS.search(str(error))
    )


def raise_if_exhausted(error: BaseException) -> None:
    """Raise a `MemoryExhaustedError` if an error reports that memory is exhausted.

    Call it before converting all errors of a library to an `IsingcutError`.

    Raises:
        MemoryExhaustedError: with the bytes that were requested, if the error has them.
    """
    if is_memory_exhausted(error):
        raise exhausted_error(error) from error


def exhausted_error(error: BaseException) -> MemoryExhaustedError:
    """Convert an out-of-memory error to one line with the bytes needed and the bytes available."""
    if isinstance(error, MemoryExhaustedError):
        return MemoryExhaustedError(str(error))
    wanted, total = (_bytes(pattern, error) for pattern in (_WANTED, _CAPACITY))
    more = "" if wanted is None else f": {wanted:,} more bytes were needed"
    more += "" if total is None else f" of {total:,} in all"
    smaller = "use a smaller --batch-tokens or --length, or --stream on"
    if _ON_GPU.search(f"{type(error).__name__} {error}"):
        line = f"the GPU is out of memory{more}; {smaller}, or --device cpu"
    else:
        line = f"this machine is out of memory{more}; end other programs, {smaller}"
    return MemoryExhaustedError(line)


def _bytes(pattern: re.Pattern[str], error: BaseException) -> int | None:
    size = pattern.search(str(error))
    return (
        int(float(size[1]) * 1024 ** "BKMGTPE".index(size[2][0].upper()))
        if size
        else None
    )


@contextlib.contextmanager
def convert_memory_errors() -> Iterator[None]:
    """Convert out-of-memory errors to `MemoryExhaustedError` within the context.

    Raises:
        MemoryExhaustedError: as for `raise_if_exhausted`; other errors are raised unchanged.
    """
    try:
        yield
    except Exception as error:
        raise_if_exhausted(error)
        raise
