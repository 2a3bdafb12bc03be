"""The model card of a checkpoint: original, removed blocks, choice, patch and healing.

files of a run -> parts, stored in the checkpoint's record -> README.md, rewritten after a healing
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup

from isingcut.data.mixture import describe_source
from isingcut.files.cuts import CardParts
from isingcut.files.evaluations import TaskRow
from isingcut.files.healings import HealingFile
from isingcut.formats.sources import hub_id
from isingcut.report.rows import benchmark_rows
from isingcut.report.run_files import PLAIN_CLASS, RunFiles
from isingcut.report.words import markdown, render, sentence

PAPER_ENERGY = "empirical-fisher"
_ANSWERED = "**Chat.** "
_HARM = "**Warning.** "
_METADATA = re.compile(r"\A---\n(?s:.*?)^(?=---\n)", re.MULTILINE)
_RESULTS = re.compile(r"^model-index:\n((- |  ).*\n)*", re.MULTILINE)


def card_parts(
    files: RunFiles, removed: Sequence[int], loads_with: str = PLAIN_CLASS
) -> CardParts:
    """Collect the parts of the model card of a cut.

    Args:
        files: those of this removal.
        removed: removed blocks, numbered as in the original.
        loads_with: name of the transformers class that loads the checkpoint.

    Raises:
        StageFileError: an existing file is damaged.
    """
    provenance = files.run.provenance
    base = hub_id(files.model)
    ranking = files.candidates
    place = provenance.model_path
    model = provenance.model
    facts = {
        "original model, SHA-256 of config, tokenizer, headers and edges": model.sha256
    }
    if size := model.weight_bytes:
        file = " (a GGUF file)" if model.gguf_sha256 else ""
        facts["original weights on disk"] = f"{size / 1e6:.1f} MB{file}"
    facts["energy"] = files.energy
    facts["seed"] = str(files.run.config.seed)
    if text := provenance.calibration:
        facts["calibration"] = describe_source(text.source)
        facts["calibration tokens, SHA-256"] = text.sha256
    if files.packing:
        command = sentence("packing_command", files, "path/to/this/folder")
        facts["cut for"] = f"{files.packing.budget}. {command}"
    facts["torch, transformers"] = f"{provenance.torch}, {provenance.transformers}"
    energy = f"The energy used here, `{files.energy}`, is not that paper's."
    if files.energy == PAPER_ENERGY:
        energy = "The energy used here is that paper's empirical-Fisher estimate."
    return CardParts(
        base_model=base,
        # A local path is useless to others, and may contain private names.
        name=base or Path(place.absolute if place else files.model).name,
        removed=list(removed),
        sublayers=files.name_blocks(removed) if files.split else "",
        total=len(files.blocks),
        how=sentence("summary", files, removed),
        measured=sentence("measured_cut", ranking, removed) if ranking else "",
        from_gguf=model.gguf_sha256 is not None,
        loads_with=loads_with,
        isingcut=provenance.isingcut,
        energy=energy,
        rows=[list(fact) for fact in facts.items()],
    )


def model_card(
    parts: CardParts, healing: HealingFile | None = None, **measured: Any
) -> str:
    """Render the README.md of a checkpoint, with its YAML front matter.

    Args:
        healing: record of the healing, if the checkpoint is healed.
        measured: scores of the GGUF file, from `gguf_card`.
    """
    healed = render("healed.md.j2", healing=healing) if healing else ""
    patch = parts.patch
    if patch and not (patch.cuts or (patch.tuning and patch.tuning.layers)):
        patch = None
    given = {"card": parts, "patch": patch, "healed": healed, "scores": None}
    given |= measured
    metadata = ModelCardData(
        base_model=parts.base_model,
        # The hub has adapter, merge, quantized and finetune. A cut has all its weights, in a
        # shape of its own; next to a GGUF file the hub would otherwise infer "quantized".
        base_model_relation=parts.base_model and "finetune",
        library_name="gguf" if given["scores"] else "transformers",
        pipeline_tag="text-generation",
        tags=["isingcut", "block-removal", "depth-pruning"],
    )
    return render("model_card.md.j2", **given, metadata=Markup(metadata.to_yaml()))


def gguf_card(files: RunFiles) -> str:
    """Render the card of `model.gguf` with its scores; empty if it was not measured."""
    scored = files.evaluation
    parts = files.removal and files.removal.card
    if not (parts and scored and scored.gguf):
        return ""
    healing = files.healing if files.healed else None
    scores = [row for row in files.scores if not row.part and "gguf" in row.values]
    packed = files.packing and files.run.blocks.packed
    card = model_card(parts, healing, evaluation=scored, scores=scores, packed=packed)
    return mark_first(card, files)


def mark_first(card: str, files: RunFiles) -> str:
    """Return a card whose first paragraphs say how many prompts a chat model answers, and what a
    repair harms, if the evaluation found a harm.

    The paragraphs of an earlier evaluation are replaced; all other text stays.
    """
    found = {
        _ANSWERED: sentence("answered_words", files) if files.answered else "",
        _HARM: sentence("harm_words", files.evaluation) if files.evaluation else "",
    }
    marked = "".join(f"{k}{markdown(v)}\n\n" for k, v in found.items() if v)
    earlier = "".join(rf"({re.escape(k)}.*\n\n)?" for k in found)
    begin = re.compile(rf"^(# .*\n\n){earlier}", re.MULTILINE)
    return begin.sub(lambda match: match[1] + marked, card, count=1)


def add_figures(card: str, files: RunFiles) -> str:
    """Return a card with the figures of a run in its metadata, for the hub.

    Those of an earlier evaluation are replaced; all other metadata stays.
    """
    results = hub_results(files)
    named = ModelCardData(model_name=files.called, eval_results=results)
    listed = f"{named.to_yaml()}\n" if results else ""
    return _METADATA.sub(lambda match: _RESULTS.sub("", match[0]) + listed, card)


def hub_results(files: RunFiles) -> list[EvalResult]:
    """Return the scores of the final model and its GGUF file, for the `model-index` of a card.

    `.eval_results/` is not suitable: on the hub it is for whole registered benchmarks, not for
    samples of them or for other text.
    """
    text = files.calibration
    source = describe_source(text.source) if text else ""
    rows = [row for row in files.scores if row.key.endswith(("perplexity", "kl"))]
    if files.benchmarks:
        rows += benchmark_rows(files.benchmarks, last=files.last)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=(on := row.label if row.notes else row.part or source),
            dataset_name=on,
            metric_type=row.notes[0] if row.notes else row.key.rpartition(": ")[2],
            # The hub sorts by the value, which cannot hold an error, so the name has it.
            metric_name=f"{', '.join(row.notes) or row.label} ({model}): {row.text(model)}",
            metric_value=value.figure,
        )
        for row in rows
        for model in (files.last, "gguf")
        if (value := row.values.get(model))
    ]


def harness_results(files: RunFiles, name: str) -> dict[str, Any]:
    """Return the benchmark scores in the format of lm-evaluation-harness's own results files.

    Args:
        name: ``original`` or ``final``.
    """
    found = files.benchmarks
    assert found is not None
    rows = {row.task: row for row in found.rows}
    return {
        "results": {row.task: _harness_scores(row, name) for row in found.rows},
        "group_subtasks": {task: [] for task in rows},
        "configs": {
            t: {"task": t, "num_fewshot": row.shots} for t, row in rows.items()
        },
        # Of the questions, because the harness's versions are of whole tasks.
        "versions": {task: row.questions_sha for task, row in rows.items()},
        "n-shot": {task: row.shots for task, row in rows.items()},
        "n-samples": {task: {"effective": row.n} for task, row in rows.items()},
        "config": {"model": "isingcut", "fewshot_seed": found.seed},
        "model_name": files.model if name == "original" else files.title,
        "lm_eval_version": found.engine.removeprefix("lm_eval "),
        "chat_template_sha": found.template_sha or None,
    }


def _harness_scores(row: TaskRow, name: str) -> dict[str, Any]:
    key = "original" if name == "original" else "cut"
    metric, _, kind = row.metric.partition(",")
    error = getattr(row, f"{key}_se")
    return {
        "alias": row.task,
        f"{metric},{kind or 'none'}": getattr(row, key),
        f"{metric}_stderr,{kind or 'none'}": "N/A" if error is None else error,
    }


def healed_card(parts: CardParts | None, card: str, healing: HealingFile) -> str:
    """Render the README.md of a checkpoint after a healing.

    Args:
        parts: card parts of the cut; None if another tool wrote it.
        card: README.md of the cut; without ``parts``, a section on the healing is added to it.
    """
    if parts is not None:
        return model_card(parts, healing)
    return f"{card.rstrip()}\n\n{render('healed.md.j2', healing=healing)}"
