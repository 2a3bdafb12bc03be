"""Memory that is used up, of the machine or of a GPU: recognised in the errors of every library.

No library is imported for that, so that `isingcut --help` stays fast.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from isingcut.errors import MemoryExhaustedError

_WORDS = re.compile("(?i)out of memory|not enough memory|(?:can't|cannot) allocate|_ALLOC_FAILED")
_WANTED = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGTPE]iB)")
_CAPACITY = re.compile(r"total capacity of ([\d.]+) ?(bytes|[KMGTPE]iB)")
_ON_GPU = re.compile("OutOfMemoryError|CUDA|CUBLAS|CUDNN|HIP|MPS")


def is_memory_exhausted(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a GPU is used up."""
    names = {c.__name__ for c in type(error).__mro__}
    if names & {"MemoryError", "MemoryExhaustedError", "OutOfMemoryError"}:
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # Torch says the rest in plain errors, as safetensors does.
    return bool(names & {"RuntimeError", "SafetensorError"} and _WORDS.search(str(error)))


def raise_if_exhausted(error: BaseException) -> None:
    """Raise a `MemoryExhaustedError` from an error that says that memory is used up.

    For whoever turns all errors of a library into one of ours: memory is not the library's fault.

    Raises:
        MemoryExhaustedError: with the bytes that were wanted, where the error has them.
    """
    if isinstance(error, MemoryExhaustedError):
        raise error
    if is_memory_exhausted(error):
        raise exhausted_error(error) from error


def exhausted_error(error: BaseException) -> MemoryExhaustedError:
    """One line of an error that says that memory is used up: what was needed, what there is."""
    if isinstance(error, MemoryExhaustedError):
        return MemoryExhaustedError(str(error), error.wanted)
    wanted, total = (_bytes(pattern, error) for pattern in (_WANTED, _CAPACITY))
    more = "" if wanted is None else f": {wanted:,} bytes more were needed"
    more += "" if total is None else f" of the {total:,} it has"
    smaller = "give a smaller --batch-tokens or --length, or --stream on"
    if _ON_GPU.search(f"{type(error).__name__} {error}"):
        line = f"the memory of the GPU is used up{more}; {smaller}, or --device cpu"
    else:
        line = f"the memory of this machine is used up{more}; end other programs, {smaller}"
    return MemoryExhaustedError(line, wanted)


def _bytes(pattern: re.Pattern[str], error: BaseException) -> int | None:
    found = pattern.search(str(error))
    return int(float(found[1]) * 1024 ** "BKMGTPE".index(found[2][0].upper())) if found else None


@contextlib.contextmanager
def convert_memory_errors() -> Iterator[None]:
    """Turn what says meanwhile that memory is used up into a `MemoryExhaustedError`.

    Raises:
        MemoryExhaustedError: as `raise_if_exhausted`; every other error passes.
    """
    try:
        yield
    except Exception as error:
        raise_if_exhausted(error)
        raise
