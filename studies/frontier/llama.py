"""Quantise files, measure their losses and time them, with llama.cpp on one thread."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import kl_div, nll_loss

from isingcut.data.tokens import Row
from isingcut.errors import ModelError


def open_model(model: Path, tokens: int, *, logits_all: bool) -> Any:
    """Load a model; keys and values are float16, llama.cpp's default."""
    options = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), tokens)
    options |= {
        "n_threads": 1,
        "n_threads_batch": 1,
        "logits_all": logits_all,
        "verbose": False,
    }
    return importlib.import_module("llama_cpp").Llama(str(model), **options)


def losses(logits: Any, reference: Any, ids: Row) -> tuple[float, float]:
    """Return KL(reference || model) and NLL, means over the predictions of a sample (T, V)."""
    ours, theirs = (torch.tensor(x).log_softmax(-1)[:-1] for x in (logits, reference))
    kl = kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return float(kl), float(nll_loss(ours, torch.tensor(ids[1:])))


def quantise(source: Path, kind: str, out: Path) -> None:
    """Write a GGUF file in one of llama.cpp's types, without an importance matrix."""
    library = importlib.import_module("llama_cpp")
    library._logger.set_verbose(False)
    options = library.llama_model_quantize_default_params()
    options.nthread = 1
    options.allow_requantize = True
    options.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    part = out.with_suffix(".part")
    if library.llama_model_quantize(bytes(source), bytes(part), options):
        raise ModelError(f"llama.cpp cannot quantise {source}")
    part.rename(out)


def measure(
    model: Path, samples: Sequence[Row], reference: Path
) -> list[tuple[float, float]]:
    """Return KL and NLL of every sample; the first model writes its logits as the reference."""
    llama = open_model(model, len(samples[0]), logits_all=True)
    found = []
    shape = (*np.shape(samples), llama.n_vocab())
    first = not reference.exists()
    place = reference.with_suffix(".part") if first else reference
    rows: Any = np.memmap(place, np.float32, "w+" if first else "r", shape=shape)
    for row, ids in zip(rows, samples, strict=True):
        llama.reset()
        llama.eval(ids)
        if first:
            row[:] = llama.scores[: len(ids)]
        found.append(losses(llama.scores[: len(ids)], row, ids))
    place.rename(reference)
    return found


def measure_speed(models: Sequence[Path], tokens: Row) -> list[tuple[float, float]]:
    """Return each model's rates of prefill and of decoding 16 tokens, per second of CPU time."""
    found = []
    for model in models:
        llama = open_model(model, len(tokens) + 32, logits_all=False)
        times = []
        # The first evaluation reads the file into memory.
        for ids in (tokens[:16], tokens, *([t] for t in tokens[:16])):
            llama.eval(ids)
            times.append(time.process_time())
        found.append((len(tokens) / (times[1] - times[0]), 16 / (times[-1] - times[1])))
    return found
