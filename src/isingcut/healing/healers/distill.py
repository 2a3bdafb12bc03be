"""`distill`: train the cut model to give the original's next-token distributions.

The loss is KL(original || cut) per predicted token at temperature 1, over real tokens; optionally
plus the relative squared distance of hidden states behind each cut. Training runs on transformers'
Trainer, so `accelerate launch`, FSDP and DeepSpeed configs, bfloat16, gradient checkpointing and
resuming work as they do there. Full fine-tuning trains all weights in float32; LoRA trains small
matrices beside all linear layers and is merged into the weights at the end.

Source: Jansen et al., arXiv 2602.00161, the retraining after the cut (one epoch, KL, temperature
1, learning rate 2e-5, cosine, 100 warm-up steps, length 1,024).
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isingcut.errors import InputError, MissingExtraError, ModelError
from isingcut.files import atomic_folder, read_json, without_header, write_json
from isingcut.healing.job import Job
from isingcut.healing.training.processes import Processes
from isingcut.healing.training.student import load_student, quiet_peft

if TYPE_CHECKING:
    from isingcut.options.healing import HealConfig

__all__ = ["Distill"]

# Written by the training run, or by `save_pretrained` anew: not copied from the start.
_REWRITTEN = ("config.json", "generation_config.json", "model.safetensors.index.json")


class Distill:
    """Distillation, full or with LoRA (`HealConfig.method`)."""

    def heal(self, job: Job, out: Path) -> dict[str, Any]:
        """Train from the job's start; an interrupted training goes on from its last save."""
        need_packages(job.config)
        from isingcut.healing.training.train import train

        trained = job.work / "trained"
        record_file = job.work / "trained.json"
        processes = Processes(job.config.device)
        if not record_file.exists():
            record = train(job, trained)
            if processes.main:
                write_json(record_file, "healing-trained", record)
            processes.wait()
        if processes.main:
            _publish(job, trained, out)
        processes.wait()
        return without_header(read_json(record_file, "healing-trained"))


def need_packages(config: HealConfig) -> None:
    """Refuse a training without the packages that it needs.

    Raises:
        MissingExtraError: one is not installed.
    """
    for package in ("accelerate", *(["peft"] if config.method == "lora" else [])):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "heal", "healing by distillation")


def _publish(job: Job, trained: Path, out: Path) -> None:
    """The trained weights as a plain checkpoint in the start's dtype, verified."""
    from isingcut.models.cutting.verify import check_generation, random_tokens, reload
    from isingcut.models.loading import quiet_transformers

    dtype = stored_dtype(job.start)
    trust = job.config.trust_remote_code
    model = load_student(job.start if job.config.method == "lora" else trained, job.config)
    if job.config.method == "lora":
        import peft

        with quiet_peft():
            adapted: Any = peft.PeftModel.from_pretrained(model, trained)
            model = adapted.merge_and_unload()
    trained_weights = model.state_dict()
    if not all(bool(torch.isfinite(t).all()) for t in trained_weights.values()):
        raise ModelError(
            "the last step left weights that are no numbers; lower --learning-rate, here "
            f"{job.config.rate:g}"
        )
    # Into a model that transformers loaded in that dtype: it keeps some tensors in float32.
    model = reload(job.start, dtype=dtype, trust_remote_code=trust)
    model.load_state_dict(trained_weights)
    tokens = random_tokens(model, 2, 24)
    with atomic_folder(out) as temporary, quiet_transformers():
        model.save_pretrained(temporary)
        for path in sorted(job.start.iterdir()):
            weights = path.suffix == ".safetensors"
            if path.is_file() and not weights and path.name not in _REWRITTEN:
                shutil.copyfile(path, temporary / path.name)
        again = reload(temporary, dtype=dtype, trust_remote_code=trust)
        with torch.no_grad():
            same = torch.equal(model(tokens).logits, again(tokens).logits)
        if not same:
            raise ModelError(
                f"the healed model was written to {out} but computes something else when loaded "
                "again; nothing was kept there"
            )
        check_generation(again, tokens[:1], 8, str(out))


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that holds most of a checkpoint's weights.

    Raises:
        InputError: quantised weights, which cannot be trained.
    """
    from isingcut.healing.patch.files import PLAIN
    from isingcut.models.checkpoint.read import read_checkpoint

    sizes: dict[str, int] = {}
    for tensor in read_checkpoint(folder).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    name = max(sizes, key=lambda k: sizes[k])
    if name not in PLAIN:
        raise InputError(
            f"{folder} holds {name} weights, which cannot be trained; cut and heal the unquantised "
            "model (the teacher may be quantised)"
        )
    return PLAIN[name]
