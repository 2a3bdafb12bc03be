"""Measure prefill and decode speed of two models, and their peak memory.

`python -m isingcut.evaluation.speed FOLDER DTYPE DEVICE TOKENS TRUST` measures peak memory in a
separate process, because a peak never decreases.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isingcut.console.progress import Progress, silent
from isingcut.data.generation import decode_tokens
from isingcut.data.tokens import TokenSet
from isingcut.errors import ModelError
from isingcut.files.evaluations import EvaluationFile
from isingcut.formats.architectures.blocks import language_model
from isingcut.memory import is_memory_exhausted
from isingcut.models.device import device_module, synchronise
from isingcut.models.load import load
from isingcut.models.placement import devices_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_DECODE_PROMPT = 16
# Standard error of a median over that of a mean, for normal errors: sqrt(pi / 2).
_MEDIAN_ERROR = 1.2533

MEMORY_KEY = "peak_memory_bytes"
BATCH = 32
"""Sequences of the batched decoding."""
PREFILL = "prefill_tokens_per_second"
DECODE = "decode_tokens_per_second"
BATCHED = "batched_decode_tokens_per_second"
SPEED_KEYS = (PREFILL, DECODE, MEMORY_KEY)
"""The keys that are missing in an evaluation without speed."""


def with_memory(
    evaluation: EvaluationFile,
    folders: Mapping[str, Path],
    *,
    length: int,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> EvaluationFile:
    """Add the peak memory of both models to an evaluation, each measured in a separate process.

    If such a process fails, for example because other programs use the memory, the key is listed
    in ``not_measured``.

    Args:
        folders: the folders of ``before`` and ``after``.
        length: number of prompt tokens.
    """
    peaks = {}
    with progress("peak memory", len(folders)) as bar:
        for name, folder in folders.items():
            peaks[name] = peak_memory(
                folder,
                evaluation.dtype,
                evaluation.device,
                tokens=length,
                trust_remote_code=trust_remote_code,
            )
            bar.advance(1)
    if None in peaks.values():
        return evaluation.model_copy(update={"not_measured": [MEMORY_KEY]})
    for name, peak in peaks.items():
        getattr(evaluation, name).peak_memory_bytes = peak
    return evaluation


@torch.no_grad()
def speed(
    models: Mapping[str, PreTrainedModel],
    sample: TokenSet,
    *,
    new_tokens: int = 32,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float | None]]:
    """Measure prefill and decode tokens/s of each model, with errors (``_se``).

    The batch size is 1, whose decoding on a GPU mostly waits for the launches of kernels. On a GPU,
    decoding is also measured with `BATCH` sequences, if they fit its memory.

    Models alternate in every repeat, so that other load on the machine affects all of them. Each
    model is warmed up once. Figures are medians over the repeats, with the standard error of a
    median (normal errors assumed). Decoding is the time of ``new_tokens`` greedy steps with a cache
    after a short prompt, without the prompt's time.

    Args:
        sample: its first row, unpadded, is the text for prefill.
        repeats: timed rounds.
        clock: function that returns the time in seconds.
    """
    ids = sample.input_ids[:1, : int(sample.mask[0].sum())]
    short = ids[:, :_DECODE_PROMPT]

    def time_call(
        model: PreTrainedModel, work: Callable[..., object], *arguments: Any
    ) -> float:
        synchronise(*devices_of(model))
        began = clock()
        work(*arguments)
        synchronise(*devices_of(model))
        return clock() - began

    def time_decoding(model: PreTrainedModel, rows: int) -> float:
        start = short.expand(rows, -1).to(model.device)
        first = time_call(model, decode_tokens, model, start, 1)
        return time_call(model, decode_tokens, model, start, 1 + new_tokens) - first

    tokens = {PREFILL: ids.shape[1], DECODE: new_tokens}
    if all(model.device.type != "cpu" for model in models.values()):
        tokens[BATCHED] = BATCH * new_tokens
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            text = ids.to(model.device)
            reading = time_call(model, partial(model, input_ids=text, use_cache=True))
            times = {PREFILL: reading, DECODE: time_decoding(model, 1)}
            try:
                times |= {
                    k: time_decoding(model, BATCH) for k in tokens if k == BATCHED
                }
            except Exception as error:
                if not is_memory_exhausted(error):
                    raise
                # It is not timed any more.
                del tokens[BATCHED]
            if repeat:
                seconds[name].append(times)
    return {
        name: {
            k: v
            for key, count in tokens.items()
            for k, v in _rate(
                model, key, count, [s[key] for s in seconds[name]]
            ).items()
        }
        for name, model in models.items()
    }


def _rate(
    model: PreTrainedModel, key: str, tokens: int, seconds: list[float]
) -> dict[str, float | None]:
    """Return the tokens per second of the median repeat, and their standard error (relatively, that
    of the seconds)."""
    middle = statistics.median(seconds)
    if middle <= 0:
        raise ModelError(
            f"{key} of {model.name_or_path} was measured as {tokens} tokens in {middle:g} s; the "
            "clock is too coarse or the machine too busy: run again, or pass --skip-speed"
        )
    error = None
    if len(seconds) > 1:
        error = (
            _MEDIAN_ERROR
            * statistics.stdev(seconds)
            / len(seconds) ** 0.5
            * tokens
            / middle**2
        )
    return {key: tokens / middle, f"{key}_se": error}


def peak_memory(
    folder: Path,
    dtype: str,
    device: str,
    *,
    tokens: int = 256,
    trust_remote_code: bool = False,
) -> int | None:
    """Measure the peak memory of loading a checkpoint, one prefill and four tokens.

    It is measured in a separate process: on a CPU the largest resident set, with Python and torch;
    on CUDA the largest allocation on the device, summed over devices.

    Returns:
        bytes; None if the process failed, for example for lack of memory.
    """
    arguments = [
        str(folder),
        dtype,
        device,
        str(tokens),
        "1" if trust_remote_code else "0",
    ]
    # -P: do not import modules from the working folder.
    command = [sys.executable, "-P", "-m", __name__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    # Libraries may print before.
    return int(done.stdout.split()[-1])


def main(arguments: list[str]) -> None:
    """Measure the peak memory, and print it in bytes as the last word."""
    folder, dtype, device, tokens, trust = arguments
    loaded = load(
        Path(folder), dtype=dtype, device=device, trust_remote_code=trust == "1"
    )
    prompt = torch.full((1, int(tokens)), 1, dtype=torch.int64, device=loaded.device)
    decode_tokens(language_model(loaded.model), prompt, 4)
    module = device_module(loaded.device)
    peaks = module and map(module.max_memory_allocated, devices_of(loaded.model))
    print(sum(peaks) if peaks else resident_peak())


def resident_peak() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status")
    text = status.read_text(errors="replace") if status.is_file() else ""
    # Unlike ru_maxrss, this does not start from the parent's peak.
    if words := text.partition("VmHWM:")[2].split():
        return int(words[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
