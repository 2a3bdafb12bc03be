"""The teacher's next-token distributions kept on disk: its k likeliest tokens and their rest.

Made once, before training; afterwards the teacher is not needed, so a teacher that does not fit
beside the student can teach all the same. 8 k + 4 bytes a token, in three plain .npy files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from isingcut.healers._processes import Processes
    from isingcut.healers.base import Job

_DONE = "done.json"


@dataclass(frozen=True, eq=False)
class Kept:
    """Stored targets of all samples, memory-mapped.

    Attributes:
        indices: (S, T, k) int32.
        logp: (S, T, k) float32 log-probabilities.
        tail: (S, T) float32, the mass of all other tokens.
    """

    indices: Any
    logp: Any
    tail: Any

    @classmethod
    def open(cls, folder: Path, mode: Literal["r", "r+"] = "r") -> Kept:
        """The files of a folder."""
        return cls(*(np.load(folder / f"{n}.npy", mmap_mode=mode) for n in _NAMES))

    def sample(self, i: int) -> dict[str, Tensor]:
        """The targets of one sample: (T, k), (T, k), (T,)."""
        return {
            "indices": torch.from_numpy(np.array(self.indices[i])).long(),
            "logp": torch.from_numpy(np.array(self.logp[i])),
            "tail": torch.from_numpy(np.array(self.tail[i])),
        }


_NAMES = ("indices", "logp", "tail")


def keep_targets(job: Job, processes: Processes) -> Kept:
    """The stored targets of the job's tokens, made by the main process where they are missing."""
    folder = job.work / "targets"
    if processes.main:
        _make(job, folder)
    processes.wait()
    return Kept.open(folder)


def _make(job: Job, folder: Path) -> None:
    from isingcut.healers._rounds import targets

    tokens, k = job.tokens, job.config.top_k
    shape = (*tokens.input_ids.shape, k)
    done = 0
    if (folder / _DONE).exists():
        done = int(json.loads((folder / _DONE).read_text(encoding="utf-8")))
        files = Kept.open(folder, "r+")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        types = ((np.int32, shape), (np.float32, shape), (np.float32, shape[:2]))
        files = Kept(
            *(
                np.lib.format.open_memmap(folder / f"{n}.npy", mode="w+", dtype=d, shape=s)
                for n, (d, s) in zip(_NAMES, types, strict=True)
            )
        )
    teacher = job.teacher.model
    rows = max(1, job.config.batch_tokens // tokens.input_ids.shape[1])
    with job.progress("keeping the original's answers", tokens.samples) as bar:
        bar.advance(done)
        while done < tokens.samples:
            part = slice(done, min(done + rows, tokens.samples))
            ids = tokens.input_ids[part].to(teacher.device)
            mask = tokens.mask[part].to(teacher.device).long()
            found = targets(teacher, ids, mask, k)
            files.indices[part] = found.indices.int().cpu().numpy()
            files.logp[part] = found.logp.cpu().numpy()
            files.tail[part] = found.tail.cpu().numpy()
            for array in (files.indices, files.logp, files.tail):
                array.flush()
            bar.advance(part.stop - done)
            done = part.stop
            (folder / _DONE).write_text(json.dumps(done), encoding="utf-8")
