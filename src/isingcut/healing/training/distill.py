"""Train the cut model to give the original's next-token distributions.

The loss is KL(original || cut) per predicted token at temperature 1, over real tokens. Training
runs on transformers' Trainer, so `accelerate launch`, FSDP and DeepSpeed configs, bfloat16,
gradient checkpointing and resuming work as they do there. Full fine-tuning trains all weights in
float32; `last:N` those of the last N blocks, the final norm and the head; LoRA trains small
matrices beside all linear layers and is merged into the weights at the end.

A time is turned into steps by the training itself, on the clock: a few steps of the least and of
the most tokens that are computed at a time are made, with all that belongs to a step. What was
decided is kept in the work folder, so that a healing that goes on later has the same schedule.

Source: Jansen et al., arXiv 2602.00161, the retraining after the cut (one epoch, KL, temperature
1, learning rate 2e-5, cosine, 100 warm-up steps, length 1,024).
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from isingcut.data.tokens import pieces
from isingcut.errors import ModelError
from isingcut.files.writing import atomic_folder
from isingcut.healing.checks import stored_dtype
from isingcut.healing.job import Job
from isingcut.healing.recipe import SHORT, Recipe, bought_recipe
from isingcut.healing.training.batches import TimedSteps
from isingcut.healing.training.student import trained_weights
from isingcut.healing.training.train import lower_rate, step_times, train
from isingcut.healing.work_folder import keep_result
from isingcut.models.architectures import text_config
from isingcut.models.cutting.verify import check_generation, random_tokens, reload
from isingcut.models.fp8 import DTYPES
from isingcut.models.loading import quiet_transformers
from isingcut.models.text_alone import text_model

# Written by the training run, or by `save_pretrained` anew: not copied from the start.
_REWRITTEN = ("config.json", "generation_config.json", "model.safetensors.index.json")
# Of the time that is left: states are written and judged, too, and no clock is exact.
_USED = 0.85


def distill(job: Job, out: Path) -> dict[str, Any]:
    """Train from the job's start and write ``out``, a plain checkpoint of the same shape and dtype.

    An interrupted training goes on from its last save. Every process calls this, and the one of
    rank 0 writes.

    Returns:
        what was done, as `healing.json` keeps it.
    """
    effort = job.config.effort
    budget = job.recipe is None and bool(effort.tokens or effort.seconds)
    if budget:
        job = _spend(job)
    found, trained = train(job)
    if job.leads:
        if (found.get("stopped") or {}).get("kept") == 0:
            shutil.copytree(job.start, out)
        else:
            _publish(job, trained, out)
    job.processes.wait()
    if budget and job.recipe is not None:
        found["recipe"] = dataclasses.asdict(job.recipe)
    return found


def _spend(job: Job) -> Job:
    """The job with its budget turned into a recipe, and its text into samples of that length."""
    began = time.monotonic()
    tokens, seconds = job.config.effort.tokens, job.config.effort.seconds
    file, pace = job.work / "recipe.json", (0.0, 0.0)
    if seconds is not None and not job.processes.decide(file.exists):
        pace = _pace(job)
        seconds = _USED * (seconds - (time.monotonic() - began))

    def make() -> dict[str, Any]:
        found = bought_recipe(
            job.config,
            job.tokens,
            tokens,
            seconds,
            pace,
            width=int(text_config(job.teacher.model).hidden_size),
            processes=job.processes.size,
        )
        return dataclasses.asdict(found)

    recipe = Recipe(**job.processes.decide(lambda: keep_result(file, make)))
    return dataclasses.replace(job, recipe=recipe, tokens=pieces(job.tokens, recipe.length))


def _pace(job: Job) -> tuple[float, float]:
    """Seconds of a step whatever its size, and of each of its tokens, measured in all processes."""
    trial = job.work / "trial"
    text = pieces(job.tokens, SHORT)
    times = step_times(dataclasses.replace(job, tokens=text, work=trial))
    if job.leads:
        shutil.rmtree(trial, ignore_errors=True)
    # The first step of a size compiles and allocates; of the others the fastest was not disturbed.
    (n, s), (m, t) = (
        min(part[1:], key=lambda step: step[1])
        for part in (times[: TimedSteps.small], times[TimedSteps.small :])
    )
    token = (t - s) / (m - n) if m > n and t > s else t / m
    return max(0.0, t - token * m), token


def _publish(job: Job, trained: Path, out: Path) -> None:
    """The trained weights as a plain checkpoint in the start's dtype, verified."""
    dtype = DTYPES[stored_dtype(job.start)]
    trust = job.config.trust_remote_code
    weights = trained_weights(job.start, trained, job.config)
    if not all(bool(torch.isfinite(t).all()) for t in weights.values()):
        raise ModelError(f"the last step left weights that are no numbers; {lower_rate(job)}")
    # Into a model that transformers loaded in that dtype: it keeps some tensors in float32.
    model = reload(job.start, dtype=dtype, trust_remote_code=trust)
    model.load_state_dict(weights)
    tokens = random_tokens(model, 2, 24)
    with atomic_folder(out) as temporary, quiet_transformers():
        model.save_pretrained(temporary)
        for path in sorted(job.start.iterdir()):
            copied = path.suffix != ".safetensors" and path.name not in _REWRITTEN
            if path.is_file() and copied:
                shutil.copyfile(path, temporary / path.name)
        again = reload(temporary, dtype=dtype, trust_remote_code=trust)
        with torch.no_grad():
            same = torch.equal(text_model(model)(tokens).logits, text_model(again)(tokens).logits)
        if not same:
            raise ModelError(
                f"the healed model computes something else when it is loaded again from {out}, "
                "where it was deleted"
            )
        check_generation(text_model(again), tokens[:1], 8, str(out))
