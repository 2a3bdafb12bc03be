"""The exceptions of isingcut.

IsingcutError                 an error that you can act on; the CLI prints it and exits 2
├── InputError                an argument, option or config value is wrong
│   ├── UnknownNameError      no part of that name in a registry
│   └── FitError              too little text or memory to fit a patch
├── ModelError                the model cannot be found or loaded
├── ArchitectureError         the model cannot be cut (correctly), with the reason
├── CalibrationError          the calibration text cannot be used
├── InfeasibleError           no state satisfies the constraints
├── StageFileError            a file of a run folder is corrupt, foreign or stale
├── OutputExistsError         an output already exists and `overwrite` was not given
├── BusyError                 another process writes to the same place
├── CheckpointError           a checkpoint is damaged or inconsistent
├── VerificationError         a written checkpoint does not compute what it should
├── MemoryExhaustedError      the machine or a GPU is out of memory
├── RankError                 another process of a distributed run failed
└── MissingExtraError         an optional package is needed
"""

import difflib
from collections.abc import Collection

NOT_FINITE = (
    "the weights are damaged or too large for this dtype: download the model again, or choose "
    "another --dtype"
)
"""Advice in errors about a model that computes NaN or infinity."""


class IsingcutError(Exception):
    """Base of all errors that you can act on.

    The message states what was expected, what was given and what to do.
    """


class InputError(IsingcutError):
    """An argument, option or configuration value is not usable."""


class UnknownNameError(InputError):
    """No registered part has this name."""


class FitError(InputError):
    """There is too little text or memory to fit a patch."""


class ModelError(IsingcutError):
    """The model cannot be found or loaded."""


class ArchitectureError(IsingcutError):
    """The model has no block stack that can be cut correctly."""


class CalibrationError(IsingcutError):
    """The calibration text is missing, unreadable or too short."""


class InfeasibleError(IsingcutError):
    """No state satisfies all constraints."""


class StageFileError(IsingcutError):
    """A file in a run folder is corrupt, foreign or does not fit the others."""


class OutputExistsError(IsingcutError):
    """The output already exists and ``overwrite`` was not given."""


class BusyError(IsingcutError):
    """Another process writes to the same run folder or output."""


class CheckpointError(IsingcutError):
    """A checkpoint on disk is damaged or contradicts its own index or config."""


class VerificationError(IsingcutError):
    """A written checkpoint does not compute the same as the original with skipped blocks."""


class MemoryExhaustedError(IsingcutError):
    """The machine or a GPU is out of memory."""


class RankError(IsingcutError):
    """Another process of a distributed run failed or lost contact.

    Attributes:
        code: exit code of the failed process, used for the whole run.
    """

    def __init__(self, message: str, *, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class MissingExtraError(IsingcutError):
    """An optional package is not installed; the message names the command to type."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"type: pip install 'isingcut[{extra}]'"
        )


_LONGEST = 300
# Errors whose messages are sentences; messages of others are unclear without the class name.
_SPEAKING = (IsingcutError, OSError, ValueError, RuntimeError, ImportError)


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line of bounded length."""
    # Torch appends the place in its own sources that raised the error.
    words = " ".join(str(error).split()).partition(" Exception raised from ")[0]
    if not words or not isinstance(error, _SPEAKING):
        words = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return words if len(words) <= _LONGEST else words[: _LONGEST - 3] + "..."


def suggest(name: str, known: Collection[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, and all."""
    return f"{nearest(name, known) or ';'} known: {', '.join(known)}"


def nearest(name: str, known: Collection[str]) -> str:
    """Return the question whether the nearest known name is meant; empty if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
