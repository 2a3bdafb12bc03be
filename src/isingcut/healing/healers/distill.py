"""`distill`: train the cut model to give the original's next-token distributions.

The loss is KL(original || cut) per predicted token at temperature 1, over real tokens; optionally
plus the relative squared distance of hidden states behind each cut. Training runs on transformers'
Trainer, so `accelerate launch`, FSDP and DeepSpeed configs, bfloat16, gradient checkpointing and
resuming work as they do there. Full fine-tuning trains all weights in float32; `last:N` those of
the last N blocks, the final norm and the head; LoRA trains small matrices beside all linear layers
and is merged into the weights at the end.

Source: Jansen et al., arXiv 2602.00161, the retraining after the cut (one epoch, KL, temperature
1, learning rate 2e-5, cosine, 100 warm-up steps, length 1,024).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from isingcut.errors import ModelError
from isingcut.files.writing import atomic_folder
from isingcut.healing.checks import stored_dtype
from isingcut.healing.job import Job
from isingcut.healing.training.student import trained_weights
from isingcut.healing.work_folder import is_kept, kept
from isingcut.models.cutting.verify import check_generation, random_tokens, reload
from isingcut.models.fp8 import DTYPES
from isingcut.models.loading import quiet_transformers
from isingcut.models.text_alone import text_model

__all__ = ["Distill"]

# Written by the training run, or by `save_pretrained` anew: not copied from the start.
_REWRITTEN = ("config.json", "generation_config.json", "model.safetensors.index.json")


class Distill:
    """Distillation of all weights, of the last ones or with LoRA (`HealConfig.method`)."""

    def heal(self, job: Job, out: Path) -> dict[str, Any]:
        """Train from the job's start; an interrupted training goes on from its last save."""
        # Needs packages that are optional.
        from isingcut.healing.training.budget import planned
        from isingcut.healing.training.train import train

        trained, record = job.work / "trained", job.work / "trained.json"
        job, bought = planned(job)
        done = is_kept(record, job.identity)
        found = {} if done else {**train(job, trained), **bought}
        if job.leads:
            stopped = kept(record, lambda: found, job.identity).get("stopped")
            if stopped and stopped["kept"] == 0:
                shutil.copytree(job.start, out)
            else:
                _publish(job, trained, out)
        job.processes.wait()
        return kept(record, lambda: found, job.identity)


def _publish(job: Job, trained: Path, out: Path) -> None:
    """The trained weights as a plain checkpoint in the start's dtype, verified."""
    dtype = DTYPES[stored_dtype(job.start)]
    trust = job.config.trust_remote_code
    weights = trained_weights(job.start, trained, job.config)
    if not all(bool(torch.isfinite(t).all()) for t in weights.values()):
        raise ModelError(
            "the last step left weights that are no numbers; lower --learning-rate, here "
            f"{job.config.rate:g}"
        )
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
