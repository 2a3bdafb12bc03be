"""What a run folder's run.json says: options, provenance, blocks, and who wrote which file."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from isingcut.data.mixture import places_in
from isingcut.errors import ModelError, StageFileError
from isingcut.files import documents
from isingcut.files.inputs import user_path
from isingcut.files.outputs import check_recorded
from isingcut.files.provenance import sources_of
from isingcut.files.writing import fingerprint, without_header, write_json
from isingcut.models.processes import ALONE
from isingcut.options.config import RunConfig
from isingcut.options.declaration import options_from

T = TypeVar("T")

MANIFEST = "run.json"

# Of one command only. Trust is given on the command line, each time: whoever opens the folder may
# be another.
_NOT_KEPT = ("out", "overwrite", "trust_remote_code", "skip_speed")


class Manifest:
    """The content of run.json, and the files that it vouches for.

    Args:
        path: the run folder.
        manifest: the content.
        overwrite: what was made with other options may be replaced.

    Attributes:
        typed_solver: the solver that was named now, not read from run.json: it alone may import
            code of others.
        processes: that go through the stages together; rank 0 alone writes.
        make_room: gives memory back where a stage ran out of it; whether it could.
        memory_record: what a stage's record says of that.
        check_model: refuses a model whose weights were changed since a session opened it.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, overwrite: bool = False) -> None:
        self.path, self.manifest, self.overwrite = path, manifest, overwrite
        self.typed_solver: str | None = None
        self.processes = ALONE
        self.make_room: Callable[[], bool] = lambda: False
        self.memory_record: Callable[[], dict[str, Any]] = dict
        self.check_model: Callable[[], None] = lambda: None

    @property
    def config(self) -> RunConfig:
        """The options the folder was made with."""
        stored = {k: v for k, v in self.manifest["config"].items() if k != "trust_remote_code"}
        # A folder that was made before there was a patch has none.
        found = options_from(RunConfig, {"patch": "none", **stored}, str(self.path / MANIFEST))
        return found.replace(out=str(self.path))

    @property
    def sources(self) -> list[Path]:
        """What the run was made from, where it lies on this machine."""
        places = self.manifest["provenance"].get("model_path", {}).values()
        return [*read_by(self.config), *(self.path / p for p in places)]

    def model_places(self, name: str) -> list[str]:
        """Where the run's model may be: as it was named, else where it was seen from this folder.

        Args:
            name: the model's name now; another than the run's own is taken as it is.

        Raises:
            ModelError: it was a local one, and is at none of these places.
        """
        places = self.manifest["provenance"].get("model_path")
        if places is None or name != self.manifest["config"]["model"]:
            return [name]
        seen = dict.fromkeys([name, places["absolute"], str(self.path / places["relative"])])
        there = [place for place in seen if user_path(place).exists()]
        if not there:
            raise ModelError(
                f"the model that {self.path} was made with is not there any more: looked at "
                f"{', '.join(seen)}; name it with --model"
            )
        return there

    @property
    def dtype(self) -> str | None:
        """What `--dtype auto` once stood for in this run; None before it was asked."""
        found = self.manifest["provenance"].get("dtype")
        return None if found is None else str(found)

    def save(self) -> None:
        """Write run.json."""
        if not self.processes.rank:
            write_json(self.path / MANIFEST, "run", without_header(self.manifest))

    def target(self, remove: str) -> Path:
        """The folder for the files of one removal: the run's own, or one of its own name."""
        if remove == self.config.removal:
            return self.path
        return self.path / f"remove-{slug(remove)}"

    def check(self, file: Path) -> None:
        """Refuse a file or folder of a stage that is not as the run wrote it.

        Raises:
            StageFileError: this run did not write it, or it was changed since.
        """
        check_recorded(self.manifest["stages"], self.path, file)

    def load(self, file: Path, read: Callable[[Path], T]) -> T:
        """What the file or folder of a finished stage holds, once it passed `check`.

        Every reading of a run's files goes through here.
        """
        self.check(file)
        found = read(file)
        documents.check_blocks(file, found, len(self.manifest["blocks"]["blocks"]))
        return found

    def finished(self, file: Path) -> dict[str, Any] | None:
        """The record of the stage that wrote a file or folder; None where that is not finished."""
        found: dict[str, Any] | None = self.manifest["stages"].get(str(file.relative_to(self.path)))
        there = found is not None and found["done"] and os.path.lexists(file)
        return found if there else None

    def record(self, file: Path) -> dict[str, Any]:
        """The record of the finished stage that wrote a file or folder.

        Raises:
            StageFileError: there is none.
        """
        found = self.finished(file)
        if found is None:
            raise StageFileError(f"this run has not finished {file}; run its stage first")
        return found

    def made_with(self, file: Path, options: dict[str, Any]) -> bool:
        """Whether a stage's file is there, finished, and made with these options.

        Raises:
            StageFileError: it is, but was changed since.
        """
        made = self._is_made(file, options)
        if made:
            self.check(file)
        return made

    def _is_made(self, file: Path, options: dict[str, Any]) -> bool:
        record = self.finished(file)
        return record is not None and record["fingerprint"] == self._fingerprint(options)

    def _fingerprint(self, options: dict[str, Any]) -> str:
        model = self.manifest["provenance"]["model"]["sha256"]
        return fingerprint({**options, "model": model})


def read_by(config: RunConfig) -> list[Path]:
    """What a run with these options reads from disk."""
    asked = [name for name in config.tasks.split(",") if name.strip().endswith(".jsonl")]
    return sources_of(
        config.model, *places_in(config.calibration), config.heal_options, config.data, *asked
    )


def slug(remove: str) -> str:
    """A removal as part of a folder name: ``attention=2,moe=3`` -> ``attention-2_moe-3``."""
    return re.sub(r"[^\w.-]", "_", remove.replace("=", "-"))


def kept(config: RunConfig) -> dict[str, Any]:
    """The options that run.json keeps."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in _NOT_KEPT}
