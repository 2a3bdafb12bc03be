"""The two buffers that streamed parts share, and how many micro-batches hide the reading."""

import concurrent.futures

import pytest
import torch

from isingcut.measure.pace import Pace
from isingcut.models.parts import Resident, Seconds
from isingcut.models.streaming.buffers import Buffers

CPU = torch.device("cpu")


def test_pace_makes_chunks_large_enough_to_hide_the_reading(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("isingcut.measure.pace.time.perf_counter", lambda: now[0])

    class Disk(Resident):
        spent = Seconds()

        def seconds(self):
            return self.spent

    disk = Disk()
    pace = Pace(disk)
    with pace.timed(2):
        now[0] += 12.0
        disk.spent = Seconds(stalled=2.0, reading=40.0)
    # Ten seconds of computing on two batches: five each; reading takes forty.
    assert pace.batches == 11
    with pace.timed(11):
        now[0] += 55.0
        disk.spent = Seconds(stalled=2.0, reading=41.0, shared=1.0)
    assert pace.batches == 5


class Numbers:
    """A part of eight bytes that come from a place which may be gone."""

    size = 8

    def __init__(self, value, gone=False):
        self.value, self.gone, self.memory = value, gone, None

    def fill(self, buffer):
        if self.gone:
            raise FileNotFoundError("renamed")
        buffer.fill_(self.value)

    def install(self, memory):
        self.memory = memory

    def remove(self):
        self.memory = None


def test_a_part_read_ahead_and_not_wanted_may_fail():
    """A proof ends with a part of the cut model on its way, and its folder is renamed."""
    buffers = Buffers(8, CPU)
    first, gone, next_one = Numbers(1), Numbers(2, gone=True), Numbers(3)
    buffers.take(first)
    buffers.expect(gone)
    concurrent.futures.wait([buffers._pending[2]])
    buffers.take(next_one)
    assert next_one.memory.tolist() == [3] * 8
    assert first.memory.tolist() == [1] * 8
    with pytest.raises(FileNotFoundError):
        buffers.take(gone)
    buffers.expect(gone)
    buffers.clear()
