"""A run folder: which stage wrote which file, with which options, and whether it still fits.

    run.json                   options, provenance, blocks, and one record per finished stage
    calibration.safetensors    token splits
    hamiltonian.safetensors    the energy (others: hamiltonian.NAME.safetensors)
    spectrum.json              \\
    candidates.json             | of the run's own removal; another removal of the same
    model/                      | Hamiltonian has them in a folder remove-SPEC/
    evaluation.json             |
    report.md, .json, .html    /
"""

from __future__ import annotations

import hashlib
import platform
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import isingcut
from isingcut.config import RunConfig, from_mapping
from isingcut.errors import OutputExistsError, StageFileError
from isingcut.files import fingerprint, is_temporary, read_json, write_json

T = TypeVar("T")

MANIFEST = "run.json"


class RunFolder:
    """The files of one run, and the record of how each was made.

    Args:
        path: the folder; `create` or `open` it.
        manifest: the content of its run.json.
        overwrite: stages made with other options may be replaced.

    Attributes:
        typed_solver: the solver that was named now, not read from run.json: it alone may import
            code of others.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, overwrite: bool = False) -> None:
        self.path, self.manifest, self.overwrite = path, manifest, overwrite
        self.typed_solver: str | None = None

    @classmethod
    def create_or_open(
        cls, path: Path, config: RunConfig, model: dict[str, Any], blocks: dict[str, Any]
    ) -> RunFolder:
        """The folder for a run of ``config``: new, or an earlier one of the same model.

        Raises:
            OutputExistsError: something else is at ``path``, or a run of another model.
        """
        cls.refuse_foreign(path, overwrite=config.overwrite)
        if (path / MANIFEST).is_file():
            folder = cls.open(path, overwrite=config.overwrite)
            before = folder.manifest["provenance"]["model"]
            if before["sha256"] != model["sha256"] and not config.overwrite:
                raise OutputExistsError(
                    f"{path} holds a run of another model ({before['name']}); "
                    "choose another --out or pass --overwrite"
                )
            if before["sha256"] != model["sha256"]:
                folder.manifest.update(stages={}, blocks=blocks)
            if not folder.config.removal or config.overwrite:
                folder.manifest["config"] = _plain(config)
            folder.manifest["provenance"]["model"] = model
            folder.typed_solver = config.solver
            folder.save()
            return folder
        manifest = {
            "config": _plain(config),
            "stages": {},
            "blocks": blocks,
            "provenance": {**versions(), "model": model},
            "complete": False,
        }
        folder = cls(path, manifest, overwrite=config.overwrite)
        folder.typed_solver = config.solver
        folder.save()
        return folder

    @staticmethod
    def refuse_foreign(path: Path, *, overwrite: bool) -> None:
        """Refuse a folder or file that is there and is not a run folder."""
        if path.is_file():
            raise OutputExistsError(f"{path} is a file; choose a folder for --out")
        if path.exists() and not (path / MANIFEST).is_file() and not overwrite and not _begun(path):
            raise OutputExistsError(
                f"{path} already exists and is not an isingcut run; nothing was written: "
                "choose another --out or pass --overwrite to put the run's files into it"
            )

    @classmethod
    def open(cls, path: Path, *, overwrite: bool = False) -> RunFolder:
        """An existing run folder.

        Raises:
            StageFileError: no run.json there, or not a readable one.
        """
        if not (path / MANIFEST).is_file():
            raise StageFileError(
                f"{path} is not an isingcut run folder (no {MANIFEST} in it); "
                "make one with: isingcut energy MODEL --out DIR"
            )
        manifest = read_json(path / MANIFEST, "run")
        for key in ("config", "stages", "blocks", "provenance"):
            if not isinstance(manifest.get(key), dict):
                raise StageFileError(
                    f"{path / MANIFEST} lacks its {key!r} part; the file is damaged: "
                    "use another folder, or delete this one and run again"
                )
        return cls(path, manifest, overwrite=overwrite)

    @property
    def config(self) -> RunConfig:
        """The options the folder was made with."""
        stored = self.manifest["config"]
        return from_mapping(stored, str(self.path / MANIFEST)).replace(out=str(self.path))

    def save(self) -> None:
        """Write run.json."""
        content = {k: v for k, v in self.manifest.items() if k not in ("format", "version")}
        write_json(self.path / MANIFEST, "run", content)

    def target(self, remove: str) -> Path:
        """The folder for the files of one removal: the run's own, or one of its own name."""
        if remove == self.config.removal:
            return self.path
        return self.path / f"remove-{slug(remove)}"

    def stage(
        self,
        name: str,
        file: Path,
        options: dict[str, Any],
        make: Callable[[Path], None],
        load: Callable[[Path], T],
    ) -> T:
        """The result of a stage: what is there, if made with the same options; else made now.

        Raises:
            OutputExistsError: made with other options, and overwriting was not allowed.
            StageFileError: the file was changed since, or is damaged.
        """
        key = str(file.relative_to(self.path))
        wanted = fingerprint({**options, "model": self.manifest["provenance"]["model"]["sha256"]})
        record = self.manifest["stages"].get(key)
        if file.exists():
            if record is None and not self.overwrite:
                raise OutputExistsError(
                    f"{file} was not written by this run; move it away or pass --overwrite"
                )
            if record is not None and record["fingerprint"] != wanted and not self.overwrite:
                raise OutputExistsError(
                    f"{file} was made with other options ({_difference(record, options)}); "
                    "choose another --out, or pass --overwrite to replace it"
                )
            if record is not None and record["fingerprint"] == wanted and record["done"]:
                if file.is_file() and record["sha256"] != file_sha256(file):
                    raise StageFileError(
                        f"{file} was changed or damaged since the run wrote it; "
                        "delete it and run its stage again"
                    )
                return load(file)
        self.manifest["stages"][key] = {
            "stage": name,
            "fingerprint": wanted,
            "options": options,
            "done": False,
        }
        self.save()
        began = time.monotonic()
        try:
            make(file)
        except Exception:
            # What was there before is as it was.
            if record is None:
                del self.manifest["stages"][key]
            else:
                self.manifest["stages"][key] = record
            self.save()
            raise
        self.manifest["stages"][key].update(
            done=True,
            seconds=round(time.monotonic() - began, 3),
            sha256=file_sha256(file) if file.is_file() else None,
        )
        self.save()
        return load(file)


def _begun(path: Path) -> bool:
    """Whether a folder holds nothing yet, or only what a kill before its first file left."""
    return all(is_temporary(p) for p in path.iterdir())


def slug(remove: str) -> str:
    """A removal as part of a folder name: ``attention=2,moe=3`` -> ``attention-2_moe-3``."""
    return re.sub(r"[^\w.-]", "_", remove.replace("=", "-"))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _plain(config: RunConfig) -> dict[str, Any]:
    import dataclasses

    return {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "overwrite")}


def _difference(record: dict[str, Any], options: dict[str, Any]) -> str:
    before = record.get("options", {})
    changed = [
        f"{k}: {before.get(k)!r} there, {v!r} now" for k, v in options.items() if before.get(k) != v
    ]
    return "; ".join(changed) or "the model differs"


def versions() -> dict[str, Any]:
    """Versions, platform and command line, for the provenance of results."""
    packages = ("torch", "transformers", "numpy", "safetensors", "numba", "dimod")
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {
        "isingcut": isingcut.__version__,
        "python": platform.python_version(),
        **found,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "command_line": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
