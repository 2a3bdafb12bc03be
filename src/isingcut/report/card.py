"""The model card of a checkpoint: what was removed, how, and from what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isingcut.models.sources import hub_id
from isingcut.report.run_files import read_run
from isingcut.report.words import removal_summary, render

UNTOUCHED = (
    "All other tensors are the original's, bit for bit, with the remaining blocks renumbered; no "
    "weight was trained."
)
PROOF = (
    "Before this checkpoint was accepted, its logits were compared with those of the original with "
    "the same blocks skipped."
)
_SOURCE = "## Source and provenance"

PAPER_ENERGY = "empirical-fisher"


def model_card(folder: Path, target: Path, removed: list[int]) -> str:
    """The README.md of a checkpoint: YAML front matter, what was removed, how, from what.

    Args:
        folder: the run folder, with its `run.json`.
        target: where the files of this removal are.
        removed: blocks that are removed, as the original numbers them.

    Raises:
        StageFileError: `run.json` is missing, or a file that is there is damaged.
    """
    files = read_run(folder, target)
    run, candidates, healed = files.run, files.candidates, files.healed_candidates
    meta = files.meta
    provenance = run["provenance"]
    base = hub_id(provenance["model"]["name"])
    # A local path says nothing to others, and something about its owner.
    name = base or Path(provenance["model"]["name"]).name
    total = len(run["blocks"]["blocks"])
    energy = run["config"]["energy"]
    calibration = provenance.get("calibration")
    rows = [
        (
            "original weights and config, SHA-256 of headers and edges",
            provenance["model"]["sha256"],
        ),
        ("energy", energy),
        ("seed", run["config"]["seed"]),
    ]
    if calibration is not None:
        source = calibration["source"]
        rows.append(("calibration", Path(source).name if Path(source).exists() else source))
        rows.append(("calibration tokens, SHA-256", calibration["sha256"]))
    rows.append(("torch, transformers", f"{provenance['torch']}, {provenance['transformers']}"))
    chosen = _row_of(candidates, removed)
    measured = None
    if chosen is not None and candidates is not None:
        error = "" if chosen["kl_se"] is None else f" ± {chosen['kl_se']:.4f}"
        measured = (
            f"On {candidates['tokens']} tokens of the text that ranked the candidates, the KL "
            f"divergence from the original is {chosen['kl']:.4f}{error} nats per token."
        )
        if candidates["chosen"]["why"] == "lowest measured KL":
            measured += " As the choice was made on it, this figure flatters the choice a little."
    if energy == PAPER_ENERGY:
        whose = "The energy used here is that paper's empirical-Fisher estimate."
        if run["config"].get("linear"):
            whose = (
                "The energy used here is that paper's empirical-Fisher estimate with the "
                "gradient term added, which the paper leaves out."
            )
    else:
        whose = f"The energy used here, `{energy}`, is not that paper's."
    return render(
        "model_card.md.j2",
        base_model=base,
        name=name,
        removed=removed,
        total=total,
        how=removal_summary(removed, total, energy, meta, candidates, healed),
        measured=measured,
        untouched=UNTOUCHED,
        proof=PROOF,
        from_gguf="gguf_sha256" in provenance["model"],
        provenance=provenance,
        whose_energy=whose,
        rows=rows,
    )


def healed_card(card: str, healing: dict[str, Any]) -> str:
    """The card of a cut checkpoint after healing: what no longer holds is said anew.

    Args:
        card: the README.md of the cut checkpoint.
        healing: the content of `healing.json`.
    """
    options = healing["options"]
    did = []
    if options["patch"] != "none":
        did.append("a linear map was folded into the block before each cut")
    if options["method"] != "none":
        how = "by low-rank adapters, merged" if options["method"] == "lora" else "in all weights"
        did.append(f"it was distilled from the original {how}")
    before, after = healing["before"], healing["after"]
    section = (
        f"## Healed\n\nAfter the cut, {' and '.join(did)}. On {healing['report_tokens']} tokens of "
        f"held-out text the KL divergence from the original went from {before['kl']:.4f} to "
        f"{after['kl']:.4f} nats per token, the perplexity from {before['perplexity']:.2f} to "
        f"{after['perplexity']:.2f} (the original: {after['original_perplexity']:.2f}). Figures "
        "elsewhere on this page are of the cut model before that. `healing.json` has the options.\n"
    )
    card = card.replace(
        UNTOUCHED, "The remaining blocks were renumbered and then healed, see below."
    )
    card = card.replace(PROOF, PROOF.replace("this checkpoint", "the cut model"))
    head, source, tail = card.partition(_SOURCE)
    return f"{head.rstrip()}\n\n{section}\n{source}{tail}".rstrip() + "\n"


def _row_of(candidates: dict[str, Any] | None, removed: list[int]) -> dict[str, Any] | None:
    if candidates is None:
        return None
    rows: list[dict[str, Any]] = [*candidates["candidates"], *candidates["random"]]
    return next((r for r in rows if sorted(r["removed"]) == sorted(removed)), None)
