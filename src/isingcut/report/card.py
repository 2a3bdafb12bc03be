"""The model card of a checkpoint: what was removed, how, from what, how it was patched and healed.

files of a run -> parts, kept in the checkpoint's own record -> README.md, again after a healing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isingcut.data.mixture import describe_source
from isingcut.errors import StageFileError
from isingcut.files.inputs import load_json
from isingcut.files.writing import check_document
from isingcut.models.sources import hub_id
from isingcut.report.read_run import read_run
from isingcut.report.render import render
from isingcut.report.rows import healing_rows, healing_start, patch_rows
from isingcut.report.run_files import PLAIN_CLASS, RunFiles
from isingcut.report.states import kl_by_part, measured_kl
from isingcut.report.words import patch_story, patch_warnings, was_tuned

PAPER_ENERGY = "empirical-fisher"


def card_parts(
    folder: Path, target: Path, removed: Sequence[int], loads_with: str = PLAIN_CLASS
) -> dict[str, Any]:
    """What the card of a cut says, as plain data.

    Args:
        folder: the run folder, with its `run.json`.
        target: where the files of this removal are.
        removed: blocks that are removed, as the original numbers them.
        loads_with: the class of transformers that loads the checkpoint.

    Raises:
        StageFileError: `run.json` is missing, or a file that is there is damaged.
    """
    files = read_run(folder, target)
    provenance = files.run["provenance"]
    base = hub_id(files.model)
    total = len(files.blocks)
    return {
        "base_model": base,
        # A local path says nothing to others, and something about its owner.
        "name": base or Path(files.model).name,
        "removed": list(removed),
        "total": total,
        "how": files.summary_of(removed),
        "measured": _measured(files.candidates, removed),
        "from_gguf": "gguf_sha256" in provenance["model"],
        "loads_with": loads_with,
        "isingcut": provenance["isingcut"],
        "energy": _energy_words(files),
        "rows": _origin_rows(files),
    }


def kept_parts(checkpoint: Path) -> dict[str, Any] | None:
    """The parts that the record inside a checkpoint keeps; None where there are none.

    Raises:
        StageFileError: they are not what a card is made of.
    """
    record = checkpoint / "isingcut.json"
    found = load_json(record, "the record of the cut", StageFileError) if record.is_file() else {}
    if not isinstance(found, dict) or "card" not in found:
        return None
    check_document(record, found, "removal")
    return {"loads_with": PLAIN_CLASS, **found["card"]}


def model_card(parts: Mapping[str, Any], healing: Mapping[str, Any] | None = None) -> str:
    """The README.md of a checkpoint: YAML front matter, what was removed, how, from what.

    Args:
        parts: as `card_parts` gives them.
        healing: content of `healing.json`, once it is healed.
    """
    found = parts.get("patch")
    patch = found if found and found["cuts"] else None
    return render(
        "model_card.md.j2",
        card=parts,
        healed="" if healing is None else _healed_section(healing),
        patch=patch,
        tuned=patch is not None and was_tuned(patch),
        story="" if patch is None else patch_story(patch),
        rows=patch_rows(patch),
        unpatched=patch_warnings(parts),
    )


def healed_card(parts: Mapping[str, Any] | None, card: str, healing: Mapping[str, Any]) -> str:
    """The README.md of a checkpoint after a healing.

    Args:
        parts: of its cut; None where that is another tool's, or an older isingcut's.
        card: the README.md of the cut, to which a section is added then.
        healing: content of `healing.json`.
    """
    if parts is not None:
        return model_card(parts, healing)
    return f"{card.rstrip()}\n\n{_healed_section(healing)}"


def _measured(candidates: Mapping[str, Any] | None, removed: Sequence[int]) -> str:
    """The measured loss of the cut, where a ranking has it; else empty."""
    if candidates is None:
        return ""
    few = candidates.get("random_tokens") or candidates["tokens"]
    sizes = {"candidates": candidates["tokens"], "random": few}
    known = {tuple(sorted(r["removed"])): (r, n) for k, n in sizes.items() for r in candidates[k]}
    row, tokens = known.get(tuple(sorted(removed)), (None, 0))
    if row is None:
        return ""
    said = (
        f"On {tokens} tokens of the text that ranked the candidates, the KL "
        f"divergence of the exact cut from the original is {measured_kl(row).text()} nats per "
        "token."
    )
    if by_part := [f"{kl.text()} on {name}" for name, kl in kl_by_part(row)]:
        said += f" By part of that text: {', '.join(by_part)}."
    if not candidates["fidelity"]["kl"]["n"]:
        said += " How well the energy ranks states was not measured."
    if candidates["chosen"]["why"] == "lowest measured KL":
        said += " As the choice was made on it, this figure flatters the choice a little."
    return said


def _energy_words(files: RunFiles) -> str:
    if files.energy != PAPER_ENERGY:
        return f"The energy used here, `{files.energy}`, is not that paper's."
    said = "The energy used here is that paper's empirical-Fisher estimate"
    if files.run["config"].get("linear"):
        said += " with the gradient term added, which the paper leaves out"
    return f"{said}."


def _origin_rows(files: RunFiles) -> list[list[str]]:
    config, provenance = files.run["config"], files.run["provenance"]
    rows = [
        [
            "original weights and config, SHA-256 of headers and edges",
            provenance["model"]["sha256"],
        ],
        ["energy", files.energy],
        ["seed", str(config["seed"])],
    ]
    if files.calibration:
        rows.append(["calibration", describe_source(files.calibration["source"])])
        rows.append(["calibration tokens, SHA-256", files.calibration["sha256"]])
    versions = f"{provenance['torch']}, {provenance['transformers']}"
    return [*rows, ["torch, transformers", versions]]


def _healed_section(healing: Mapping[str, Any]) -> str:
    options = healing["options"]
    did = []
    if options["patch"] != "none":
        did.append("a linear map was folded into the block before each cut")
    if options["method"] != "none":
        how = "by low-rank adapters, merged" if options["method"] == "lora" else "in all weights"
        did.append(f"it was distilled from the original {how}")
    rows = {row.key: row for row in healing_rows(healing)}
    return render(
        "healed.md.j2",
        did=" and ".join(did),
        tokens=healing["report_tokens"],
        start=healing_start(healing),
        kl=rows["kl"],
        perplexity=rows["perplexity"],
        by_part=[row for row in rows.values() if row.part],
    )
