"""The teacher's next-token distributions kept on disk: its k likeliest tokens and their rest.

Made once, before training; afterwards the teacher is not needed, so a teacher that does not fit
beside the student can teach all the same. 8 k + 4 bytes a token, in three plain .npy files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.files.writing import clear_os_errors, read_json, write_json
from isingcut.healing.job import Job
from isingcut.healing.training.kl import TopK, stacked, top_k
from isingcut.healing.training.rounds import targets
from isingcut.models.device import BatchLimit
from isingcut.models.streaming.replay import StreamedReplay

_DONE, _KIND = "done.json", "healing-targets"


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


def keep_targets(job: Job) -> Kept:
    """The stored targets of the job's tokens; rank 0 makes those that are missing."""
    folder = job.work / "targets"
    if job.leads:
        _make(job, folder)
    job.processes.wait()
    return Kept.open(folder)


@contextlib.contextmanager
def parked(job: Job) -> Iterator[None]:
    """Meanwhile, the teacher is in host memory; its kept answers stand for it."""
    model: Any = job.teacher.model
    if job.replay is not None:
        job.replay.store.buffers.clear()
        yield
        return
    model.to("cpu")
    BatchLimit(job.teacher.device).release()
    yield
    # Not after an error, which may hold what fills the device.
    model.to(job.teacher.device)


def _make(job: Job, folder: Path) -> None:
    tokens, k = job.tokens, job.config.top_k
    shape = (*tokens.input_ids.shape, k)
    done = 0
    if (folder / _DONE).exists():
        done = int(read_json(folder / _DONE, _KIND)["samples"])
        files = Kept.open(folder, "r+")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        types = ((np.int32, shape), (np.float32, shape), (np.float32, shape[:2]))
        with clear_os_errors(folder):
            files = Kept(
                *(
                    _reserved(folder / f"{n}.npy", d, s)
                    for n, (d, s) in zip(_NAMES, types, strict=True)
                )
            )
    together = max(1, job.config.batch_tokens // tokens.input_ids.shape[1])
    answers = _in_memory if job.replay is None else _streamed
    rows = together if job.replay is None else _group(job.replay, tokens, together)
    with job.progress("keeping the original's answers", tokens.samples) as bar:
        bar.advance(done)
        while done < tokens.samples:
            part = slice(done, min(done + rows, tokens.samples))
            found = answers(job, part, together, k)
            files.indices[part] = found.indices.int().cpu().numpy()
            files.logp[part] = found.logp.cpu().numpy()
            files.tail[part] = found.tail.cpu().numpy()
            for array in (files.indices, files.logp, files.tail):
                array.flush()
            bar.advance(part.stop - done)
            done = part.stop
            write_json(folder / _DONE, _KIND, {"samples": done})


def _reserved(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """A new memory-mapped array whose room on the disk is taken at once.

    A mapped page for which the disk has no room would kill the process.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as f:
            os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
    return array


def _in_memory(job: Job, part: slice, together: int, k: int) -> TopK:
    """The answers to some samples, from a teacher in memory."""
    teacher = job.teacher.model
    ids = job.tokens.input_ids[part].to(teacher.device)
    return targets(teacher, ids, k)


def _group(replay: StreamedReplay, tokens: TokenSet, together: int) -> int:
    """Samples whose hidden states fit in memory: each block is read once for all of them."""
    batch = tokens.select(range(min(together, tokens.samples)))
    room = replay.room(batch) * batch.samples // max(1, replay.stream_bytes(batch))
    return max(together, room // together * together)


def _streamed(job: Job, part: slice, together: int, k: int) -> TopK:
    """The same from blocks read from disk, batches in the inner loop."""
    replay = job.replay
    assert replay is not None
    ids = job.tokens.input_ids[part]
    with torch.inference_mode():
        recordings = [replay.record(batch) for batch in torch.split(ids, together)]
        streams = [r.entered for r in recordings]
        for i in range(len(replay)):
            for b, recording in enumerate(recordings):
                streams[b] = recording.block(i, streams[b])
        return stacked(
            [
                top_k(recording.logits(stream[s], s), k)
                for recording, stream in zip(recordings, streams, strict=True)
                for s in range(len(stream))
            ]
        )
