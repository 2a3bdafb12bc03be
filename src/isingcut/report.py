"""Run folder to `report.md`, `report.json` and the checkpoint's model card.

Reads files only, never a model. A file that is not there is said to be not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isingcut.errors import StageFileError
from isingcut.files import atomic_file, read_json, write_json
from isingcut.hamiltonian import Hamiltonian
from isingcut.model_sources import hub_id
from isingcut.report_words import (
    comparison,
    fidelity_rows,
    fidelity_warnings,
    removal_summary,
    render,
    spectrum_map,
    spectrum_words,
)

PAPER_ENERGY = "empirical-fisher"


def write_report(folder: Path, target: Path | None = None) -> None:
    """Write `report.json` and `report.md` from what the run's files say.

    Args:
        folder: the run folder, with its `run.json`.
        target: where the files of one removal are; by default the run folder itself.

    Raises:
        StageFileError: `run.json` is missing, or a file that is there is damaged.
    """
    target = target or folder
    run = read_json(folder / "run.json", "run")
    spectrum = _optional(target / "spectrum.json", "spectrum")
    candidates = _optional(target / "candidates.json", "candidates")
    evaluation = _optional(target / "evaluation.json", "evaluation")
    removal = _optional(target / "model" / "isingcut.json", "removal")
    hamiltonian = _hamiltonian(folder)
    try:
        page, data = _contents(
            folder, target, run, spectrum, candidates, evaluation, removal, hamiltonian
        )
    except (KeyError, TypeError, IndexError, AttributeError) as e:
        raise StageFileError(
            f"a results file in {target} lacks a part that the report needs ({e!r}); "
            "run its stage again"
        ) from e
    write_json(target / "report.json", "report", data)
    with atomic_file(target / "report.md") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _contents(
    folder: Path,
    target: Path,
    run: dict[str, Any],
    spectrum: dict[str, Any] | None,
    candidates: dict[str, Any] | None,
    evaluation: dict[str, Any] | None,
    removal: dict[str, Any] | None,
    hamiltonian: Hamiltonian | None,
) -> tuple[str, dict[str, Any]]:
    """The page, and the same facts as data."""
    total = len(run["blocks"]["blocks"])
    energy = run["config"]["energy"]
    name = run["provenance"]["model"]["name"]
    removed = _removed(removal, candidates)
    meta = dict(hamiltonian.meta) if hamiltonian is not None else None
    judged = {} if candidates is None else {energy: candidates["fidelity"]}
    if candidates is not None:
        judged |= candidates.get("fidelity_of_others", {})
    warnings = [] if candidates is None else fidelity_warnings(energy, candidates["fidelity"]["kl"])
    absent = {
        "energy": hamiltonian,
        "solve": spectrum,
        "rank": candidates,
        "excise": removal,
        "evaluate": evaluation,
    }
    not_run = [stage for stage, found in absent.items() if found is None]
    page = render(
        "report.md.j2",
        title=_title(name, removed, total),
        removed=removed,
        summary=removal_summary(removed, total, energy, meta, candidates),
        evaluation=evaluation,
        comparison=[] if evaluation is None else comparison(evaluation),
        candidates=candidates,
        fidelity=fidelity_rows(judged),
        warnings=warnings,
        spectrum=spectrum,
        spectrum_words="" if spectrum is None else spectrum_words(spectrum),
        marked=removed is not None
        and spectrum is not None
        and any(s["removed"] == removed for s in spectrum["states"]),
        map=[] if spectrum is None else spectrum_map(spectrum, candidates, removed),
        checkpoint=_relative(target / "model", folder) if removal is not None else None,
        provenance=_provenance(run, meta),
        timings=_timings(run, folder, target),
        run=_arguments(run, folder, target),
    )
    data = {
        "model": run["provenance"]["model"],
        "blocks": total,
        "removed": removed,
        "checkpoint": "model" if removal is not None else None,
        "not_run": not_run,
        "energy": {"name": energy, "meta": meta},
        "fidelity": judged,
        "warnings": warnings,
        "spectrum": _without_header(spectrum),
        "candidates": _without_header(candidates),
        "evaluation": _without_header(evaluation),
        "config": run["config"],
        "provenance": run["provenance"],
        "stages": run["stages"],
    }
    return page, data


def model_card(folder: Path, target: Path, removed: list[int]) -> str:
    """The README.md of a checkpoint: YAML front matter, what was removed, how, from what.

    Args:
        folder: the run folder, with its `run.json`.
        target: where the files of this removal are.
        removed: blocks that are removed, as the original numbers them.

    Raises:
        StageFileError: `run.json` is missing, or a file that is there is damaged.
    """
    run = read_json(folder / "run.json", "run")
    candidates = _optional(target / "candidates.json", "candidates")
    hamiltonian = _hamiltonian(folder)
    meta = dict(hamiltonian.meta) if hamiltonian is not None else None
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
        how=removal_summary(removed, total, energy, meta, candidates),
        measured=measured,
        from_gguf="gguf_sha256" in provenance["model"],
        provenance=provenance,
        whose_energy=whose,
        rows=rows,
    )


def _optional(path: Path, kind: str) -> dict[str, Any] | None:
    return read_json(path, kind) if path.exists() else None


def _hamiltonian(folder: Path) -> Hamiltonian | None:
    path = folder / "hamiltonian.safetensors"
    return Hamiltonian.load(path) if path.exists() else None


def _removed(removal: dict[str, Any] | None, candidates: dict[str, Any] | None) -> list[int] | None:
    """What is gone from the checkpoint; without one, what was chosen."""
    if removal is not None:
        return sorted(removal["removed"])
    return None if candidates is None else sorted(candidates["chosen"]["removed"])


def _row_of(candidates: dict[str, Any] | None, removed: list[int]) -> dict[str, Any] | None:
    if candidates is None:
        return None
    rows: list[dict[str, Any]] = [*candidates["candidates"], *candidates["random"]]
    return next((r for r in rows if sorted(r["removed"]) == sorted(removed)), None)


def _without_header(document: dict[str, Any] | None) -> dict[str, Any] | None:
    if document is None:
        return None
    return {k: v for k, v in document.items() if k not in ("format", "version")}


def _title(name: str, removed: list[int] | None, total: int) -> str:
    if removed is None:
        return f"{name}: {total} blocks"
    return f"{name} without {len(removed)} of its {total} blocks"


def _arguments(run: dict[str, Any], folder: Path, target: Path) -> str:
    """What to type after a stage's verb to work on this removal."""
    name = folder.resolve().name
    if target == folder:
        return name
    record = run["stages"].get((target / "spectrum.json").relative_to(folder).as_posix())
    return name if record is None else f"{name} --remove {record['options']['remove']}"


def _relative(path: Path, folder: Path) -> str:
    """How the checkpoint is reached from where the run folder is."""
    return (Path(folder.resolve().name) / path.relative_to(folder)).as_posix()


def _provenance(run: dict[str, Any], meta: dict[str, Any] | None) -> list[tuple[str, str]]:
    config, origin = run["config"], run["provenance"]
    rows = [
        ("model", f"`{origin['model']['name']}`"),
        ("model, SHA-256 of config, headers and edges", f"`{origin['model']['sha256']}`"),
    ]
    if "gguf_sha256" in origin["model"]:
        rows.append(
            ("unpacked to bfloat16 from a GGUF file, SHA-256", origin["model"]["gguf_sha256"])
        )
    calibration = origin.get("calibration")
    if calibration is not None:
        splits = ", ".join(
            f"{split}: {size['samples']} samples, {size['tokens']} tokens"
            for split, size in calibration["splits"].items()
        )
        rows += [
            ("calibration", f"`{calibration['source']}` ({splits})"),
            ("calibration tokens, SHA-256", f"`{calibration['sha256']}`"),
        ]
    rows += [
        ("energy", f"`{config['energy']}`" + ("" if meta is None else f", {_facts(meta)}")),
        ("options", ", ".join(f"{k}={v}" for k, v in config.items() if v not in ("", None))),
        ("command line", f"`{origin['command_line']}`"),
        ("created", origin["created"]),
        ("isingcut", origin["isingcut"]),
        ("python, torch, transformers", _versions(origin)),
        ("machine", f"{origin['platform']}, {origin['cpu']}"),
    ]
    return [(key, str(value).replace("|", "\\|")) for key, value in rows]


def _facts(meta: dict[str, Any]) -> str:
    plain = {k: v for k, v in meta.items() if k != "energy" and isinstance(v, str | int | float)}
    return ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in plain.items())


def _versions(origin: dict[str, Any]) -> str:
    return ", ".join(str(origin[k]) for k in ("python", "torch", "transformers"))


def _timings(run: dict[str, Any], folder: Path, target: Path) -> list[tuple[str, str, str]]:
    """Stages this removal rests on; those of other removals are left out."""
    own = "" if target == folder else f"{target.relative_to(folder).as_posix()}/"
    shared = ("calibration.", "hamiltonian.")
    rows = []
    for file, record in run["stages"].items():
        key = Path(file).as_posix()
        if not key.startswith(shared) and key.removeprefix(own) not in (
            "spectrum.json",
            "candidates.json",
            "model",
            "evaluation.json",
        ):
            continue
        seconds = f"{record['seconds']:.1f}" if record["done"] else "not finished"
        rows.append((record["stage"], f"`{key}`", seconds))
    return rows
