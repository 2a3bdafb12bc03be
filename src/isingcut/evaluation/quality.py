"""Before and after, on text that neither the energy nor the ranking has seen."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isingcut.data.generation import decode_tokens, generate_text
from isingcut.data.tokens import TokenSet
from isingcut.errors import ModelError
from isingcut.measure.losses import standard_error
from isingcut.models.architectures import find_stack
from isingcut.models.sources import weight_files
from isingcut.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from isingcut.models.load import LoadedModel

__all__ = [
    "disk_bytes",
    "evaluate",
    "generate_text",
    "peak_memory",
    "quality",
    "sample_sums",
    "speed",
]

# Float32 elements of logits looked at together: a few copies of this bound the extra memory.
_CHUNK_ELEMENTS = 1 << 23
_DECODE_PROMPT = 16
# Of a median over that of a mean, for normal errors: sqrt(pi / 2).
_MEDIAN_ERROR = 1.2533

SPEED_KEYS = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")
"""What an evaluation without speed leaves out."""


def evaluate(
    original: LoadedModel,
    cut: LoadedModel,
    tokens: TokenSet,
    *,
    batch_tokens: int = 1024,
    prompt: str = "Explain in two sentences why the sky is blue.",
    new_tokens: int = 48,
    skip_speed: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Quality, size, speed and memory of both models, as `evaluation.json` keeps them.

    Speed is measured with all the threads that torch takes on this machine, whatever a run
    measures its losses with.

    Args:
        tokens: the report split.
        batch_tokens: tokens computed at a time.
        prompt: for one greedy generation of at most ``new_tokens`` by each model.
        skip_speed: leave out speed and memory; ``not_measured`` names the keys.
        trust_remote_code: for the subprocesses that measure memory.
    """
    both = {"before": original, "after": cut}
    found = quality(original.model, cut.model, tokens, batch_tokens, progress=progress)
    figures: dict[str, dict[str, Any]] = {name: {} for name in both}
    if not skip_speed:
        figures = speed_and_memory(
            both, tokens, trust_remote_code=trust_remote_code, progress=progress
        )
    texts, sides = {}, {}
    with progress("one generation", len(both)) as bar:
        for name, loaded in both.items():
            texts[name] = generate_text(loaded.model, loaded.tokenizer, prompt, new_tokens)
            sides[name] = {
                **found[name],
                "parameters": sum(p.numel() for p in loaded.model.parameters()),
                "bytes": disk_bytes(loaded.folder),
                "blocks": len(find_stack(loaded.model)),
                **figures[name],
            }
            bar.advance(1)
    return {
        "samples": tokens.samples,
        "tokens": tokens.tokens,
        **sides,
        "kl": found["kl"],
        "kl_se": found["kl_se"],
        "generation": {"prompt": prompt, **texts},
        "device": str(original.device),
        "dtype": str(original.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **({"not_measured": list(SPEED_KEYS)} if skip_speed else {}),
    }


def with_speed(
    found: Mapping[str, Any],
    original: LoadedModel,
    cut: LoadedModel,
    tokens: TokenSet,
    *,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """An evaluation that left out speed and memory, with both measured now."""
    figures = speed_and_memory(
        {"before": original, "after": cut},
        tokens,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    complete = {k: v for k, v in found.items() if k not in ("not_measured", "format", "version")}
    sides = {name: {**found[name], **figures[name]} for name in figures}
    return {**complete, **sides, "threads": torch.get_num_threads()}


def speed_and_memory(
    both: Mapping[str, LoadedModel],
    tokens: TokenSet,
    *,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> dict[str, dict[str, Any]]:
    """The figures of `SPEED_KEYS` for each model, those of `speed` with their errors."""
    with progress("speed and memory", 1 + len(both)) as bar:
        found: dict[str, dict[str, Any]] = {}
        speeds = speed({k: m.model for k, m in both.items()}, tokens.select([0]))
        bar.advance(1)
        for name, loaded in both.items():
            memory = peak_memory(
                loaded.folder,
                str(loaded.dtype).removeprefix("torch."),
                str(loaded.device),
                tokens=int(tokens.input_ids.shape[1]),
                trust_remote_code=trust_remote_code,
            )
            found[name] = {**speeds[name], "peak_memory_bytes": memory}
            bar.advance(1)
    return found


def quality(
    original: PreTrainedModel,
    cut: PreTrainedModel,
    tokens: TokenSet,
    batch_tokens: int = 1024,
    *,
    progress: Progress = silent,
) -> dict[str, Any]:
    """NLL and perplexity of both models and KL(original || cut), per token, in nats.

    Means are over tokens, standard errors over samples (a ratio estimator, linearised; for the
    perplexity by the delta method) and None for a single sample. Logits become float32 a few
    tokens at a time.
    """
    sums = sample_sums(original, cut, tokens, batch_tokens, progress=progress)
    return quality_of(sums, tokens)


def sample_sums(
    original: PreTrainedModel,
    cut: PreTrainedModel,
    tokens: TokenSet,
    batch_tokens: int = 1024,
    *,
    progress: Progress = silent,
) -> npt.NDArray[np.float64]:
    """(3, m): by sample, NLL of both models and KL(original || cut), summed over its tokens."""
    sums = np.zeros((3, tokens.samples))
    batches = tokens.batches(batch_tokens)
    with progress("perplexity and KL on unseen text", len(batches)) as bar, torch.inference_mode():
        for batch in batches:
            before = original(input_ids=batch.input_ids.to(original.device), use_cache=False).logits
            after = cut(input_ids=batch.input_ids.to(cut.device), use_cache=False).logits
            for row, position in enumerate(batch.index.tolist()):
                end = int(batch.predicted[row].sum())
                labels = batch.input_ids[row, 1 : end + 1].to(before.device)
                sums[:, position] = compared(
                    before[row, :end], after[row, :end].to(before.device), labels
                )
            bar.advance(1)
    return sums


def quality_of(sums: npt.NDArray[np.float64], tokens: TokenSet) -> dict[str, Any]:
    """`quality` from each sample's sums over its tokens, (3, m): NLL of both models and KL."""
    counts = tokens.predicted.sum(1).numpy().astype(np.int64)
    nll_before, nll_after, kl = sums.sum(1) / counts.sum()
    errors = standard_error(sums, counts)
    return {
        "before": _perplexity(nll_before, errors[0]),
        "after": _perplexity(nll_after, errors[1]),
        "kl": float(kl),
        "kl_se": _finite(errors[2]),
    }


def compared(before: Tensor, after: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """NLL of both and KL, summed over the T tokens of (T, V) logits."""
    totals = torch.zeros(3, dtype=torch.float64)
    rows = max(1, _CHUNK_ELEMENTS // before.shape[-1])
    for start in range(0, len(labels), rows):
        part = slice(start, start + rows)
        p = torch.log_softmax(before[part].float(), dim=-1)
        q = torch.log_softmax(after[part].float(), dim=-1)
        label = labels[part, None]
        totals[0] -= p.gather(1, label).sum(dtype=torch.float64).cpu()
        totals[1] -= q.gather(1, label).sum(dtype=torch.float64).cpu()
        totals[2] += (p.exp() * (p - q)).sum(-1).sum(dtype=torch.float64).cpu()
    first, second, third = totals.tolist()
    return first, second, third


def _perplexity(nll: float, error: float) -> dict[str, Any]:
    value = float(np.exp(nll))
    return {
        "perplexity": value,
        "perplexity_se": _finite(value * error),
        "nll": float(nll),
        "nll_se": _finite(error),
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


@torch.no_grad()
def speed(
    models: Mapping[str, PreTrainedModel],
    sample: TokenSet,
    *,
    new_tokens: int = 32,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float | None]]:
    """Prefill and decode tokens per second of each model, batch size 1, with errors (``_se``).

    Models take turns in every repeat, so that what else the machine does hits all alike; each
    is warmed up once, and medians over the repeats are reported, with the standard error of a
    median (normal errors assumed) from the repeats' spread. Decoding is the time of
    ``new_tokens`` greedy steps with a cache after a short prompt, the prompt's own time taken off.

    Args:
        sample: its first row, unpadded, is the text that is read.
        repeats: timed rounds.
        clock: seconds.
    """
    ids = sample.input_ids[:1, : int(sample.mask[0].sum())]
    short = ids[:, :_DECODE_PROMPT]

    def timed(model: PreTrainedModel, work: Callable[..., object], *arguments: Any) -> float:
        _synchronise(model)
        began = clock()
        work(*arguments)
        _synchronise(model)
        return clock() - began

    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            text, start = ids.to(model.device), short.to(model.device)
            reading = timed(model, _prefill, model, text)
            first = timed(model, decode_tokens, model, start, 1)
            all_of = timed(model, decode_tokens, model, start, 1 + new_tokens)
            if repeat:
                prefill[name].append(reading)
                decode[name].append(all_of - first)
    return {
        name: {
            **_rate("prefill_tokens_per_second", ids.shape[1], prefill[name]),
            **_rate("decode_tokens_per_second", new_tokens, decode[name]),
        }
        for name in models
    }


def _rate(key: str, tokens: int, seconds: list[float]) -> dict[str, float | None]:
    """Tokens per second of the median repeat, and its standard error (relative: that of the
    seconds)."""
    middle = statistics.median(seconds)
    error = None
    if len(seconds) > 1:
        error = _MEDIAN_ERROR * statistics.stdev(seconds) / len(seconds) ** 0.5 * tokens / middle**2
    return {key: tokens / middle, f"{key}_se": error}


def _prefill(model: PreTrainedModel, text: Tensor) -> None:
    model(input_ids=text, use_cache=True)


def _synchronise(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def peak_memory(
    folder: Path, dtype: str, device: str, *, tokens: int = 256, trust_remote_code: bool = False
) -> int:
    """Peak memory in bytes of loading a checkpoint, one prefill and four decoded tokens.

    Measured in a process of its own: on a CPU its largest resident set, Python and torch
    included; on CUDA the largest allocation on the device.

    Raises:
        ModelError: that process failed, for example for lack of memory.
    """
    trust = "1" if trust_remote_code else "0"
    # -P: what lies in the working folder, a run of others perhaps, is no module.
    command = [
        sys.executable,
        "-P",
        "-m",
        "isingcut.evaluation.measure_process",
        str(folder),
        dtype,
        device,
    ]
    done = subprocess.run(
        [*command, str(tokens), trust], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"measuring the memory of {folder} failed: {last}")
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_memory_bytes"])


def disk_bytes(folder: Path) -> int:
    """Bytes of the checkpoint's weights on disk."""
    return sum(file.stat().st_size for file in weight_files(folder))
