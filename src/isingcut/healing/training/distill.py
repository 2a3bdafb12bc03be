"""Distil a cut checkpoint: choose the training for a budget, train, and write a checkpoint.

A time budget is converted to steps by timing a few steps with the smallest and the largest
micro-batch. The result is kept in the work folder, so that a resumed healing has the same schedule.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from isingcut.data.tokens import pieces
from isingcut.errors import ModelError
from isingcut.files.healings import HealingRecipe
from isingcut.files.writing import atomic_folder
from isingcut.formats.architectures.blocks import language_model
from isingcut.formats.checkpoints import Checkpoint
from isingcut.formats.fp8 import DTYPES, read_tensor
from isingcut.formats.libraries import quiet_transformers
from isingcut.healing.job import Job, choose_recipe, stored_dtype
from isingcut.healing.training.student import load_trained
from isingcut.healing.training.train import lower_rate, measure_pace, train
from isingcut.healing.work_folder import RECIPE, keep_result
from isingcut.models.verify import check_generation, random_tokens, reload

# Files that `save_pretrained` or the training writes, so they are not copied from the start.
_REWRITTEN = ("config.json", "generation_config.json", "model.safetensors.index.json")
# Usable share of the remaining time: states and checks take time too, and timing is inexact.
_USED = 0.85


def distill(job: Job, out: Path) -> dict[str, Any]:
    """Train the job's start checkpoint and write ``out``, a plain one of the same shapes and dtype.

    An interrupted training resumes from its last state. Every process calls this; rank 0 writes.

    Returns:
        the record for `healing.json`.
    """
    budget = bool(job.config.training.tokens or job.config.training.seconds)
    if budget:
        job = _spend(job)
    record, trained = train(job)
    if job.leads:
        if "stopped" in record and record["stopped"].kept == 0:
            shutil.copytree(job.start, out)
        else:
            _publish(job, trained, out)
    job.processes.wait()
    if budget:
        record["recipe"] = job.recipe
    return record


def _spend(job: Job) -> Job:
    """Return the job with a recipe for its budget, and its text in samples of that length."""
    began = time.monotonic()
    seconds = job.config.training.seconds
    file = job.work / RECIPE.file
    pace = (0.0, 0.0)
    if seconds is not None and not job.processes.decide(file.exists):
        pace = measure_pace(job)
        seconds = _USED * (seconds - job.spent - (time.monotonic() - began))

    make = partial(choose_recipe, job, seconds, pace)
    kept = job.processes.decide(
        lambda: keep_result(file, HealingRecipe, make).content()
    )
    recipe = HealingRecipe(**kept)
    return dataclasses.replace(
        job, recipe=recipe, tokens=pieces(job.tokens, recipe.length)
    )


def _publish(job: Job, trained: Path, out: Path) -> None:
    """Write the trained weights as a plain checkpoint in the start's dtype, and verify the file."""
    dtype = DTYPES[stored_dtype(job.start)]
    trust = job.config.trust_remote_code
    weights = load_trained(job.start, trained, job.config)
    if not all(bool(torch.isfinite(t).all()) for t in weights.values()):
        raise ModelError(
            f"the last step left NaN or infinite weights; {lower_rate(job)}"
        )
    # Load into a model of that dtype, because transformers keeps some tensors in float32.
    model = reload(job.start, dtype=dtype, trust_remote_code=trust)
    model.load_state_dict(weights)
    tokens = random_tokens(model, 2, 24)
    with atomic_folder(out) as temporary, quiet_transformers():
        # The model was loaded without its layers for multi-token prediction: copy them unchanged.
        mtp = {
            n: read_tensor(t)
            for n, t in Checkpoint.read(job.start).mtp_tensors().items()
        }
        model.save_pretrained(
            temporary, state_dict=model.state_dict() | mtp if mtp else None
        )
        for path in sorted(job.start.iterdir()):
            copied = path.suffix != ".safetensors" and path.name not in _REWRITTEN
            if path.is_file() and copied:
                shutil.copyfile(path, temporary / path.name)
        again = reload(temporary, dtype=dtype, trust_remote_code=trust)
        with torch.no_grad():
            same = torch.equal(
                language_model(model)(tokens).logits,
                language_model(again)(tokens).logits,
            )
        if not same:
            raise ModelError(
                f"the healed model gives other logits after reloading it from {out}; it was "
                "deleted there"
            )
        check_generation(language_model(again), tokens[:1], 8, str(out))
