"""Where the figures of a run come from: rows of names and values for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isingcut.report.run_files import RunFiles


def provenance_rows(files: RunFiles) -> list[tuple[str, str]]:
    """Model, text, energy, cut, options, versions and machine, with backticks around code."""
    run, meta = files.run, files.meta
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
    reading = origin.get("reading", {}).get(config["energy"])
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
        *([("weights", _read(reading))] if reading else []),
        *([] if files.proof is None else [("proof of the cut", _proof(files.proof))]),
        ("options", ", ".join(f"{k}={v}" for k, v in config.items() if v not in ("", None))),
        ("command line", f"`{origin['command_line']}`"),
        ("created", origin["created"]),
        ("isingcut", origin["isingcut"]),
        (
            "python, torch, transformers",
            ", ".join(str(origin[k]) for k in ("python", "torch", "transformers")),
        ),
        ("machine", f"{origin['platform']}, {origin['cpu']}"),
    ]
    return [(key, str(value)) for key, value in rows]


def _proof(found: dict[str, Any]) -> str:
    return (
        f"{found['inputs']}: logits of the reloaded checkpoint and of the original with the blocks "
        f"skipped differ by {found['difference']:.1e} of their size"
    )


def _read(found: dict[str, Any]) -> str:
    return (
        f"streamed: read {found['sweeps']:.1f} times for the energy, "
        f"{100 * found['from_memory']:.0f} % of it from host memory"
    )


def _facts(meta: dict[str, Any]) -> str:
    plain = {k: v for k, v in meta.items() if k != "energy" and isinstance(v, str | int | float)}
    return ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in plain.items())


def timing_rows(run: dict[str, Any], folder: Path, target: Path) -> list[tuple[str, str, str]]:
    """Stages this removal rests on, with file and seconds; those of other removals are left out."""
    own = "" if target == folder else f"{target.relative_to(folder).as_posix()}/"
    rows = []
    for file, record in run["stages"].items():
        key = Path(file).as_posix()
        shared = key.startswith(("calibration.", "hamiltonian."))
        if shared or (key.startswith(own) and "/" not in key.removeprefix(own)):
            seconds = f"{record['seconds']:.1f}" if record["done"] else "not finished"
            rows.append((record["stage"], f"`{key}`", seconds))
    return rows
