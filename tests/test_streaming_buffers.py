"""The two buffers that streamed parts share, and the parts that stay in host memory."""

import concurrent.futures

import pytest
import torch

from isingcut.models.streaming.store import Buffers
from isingcut.testing import cards

CPU = torch.device("cpu")


class Numbers:
    """A part of eight bytes that come from a place which may be gone."""

    size, hits, misses = 8, 0, 0

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


def test_parts_stay_in_host_memory_up_to_a_bound():
    buffers = Buffers(8, CPU)
    buffers.bound = 16
    parts = [Numbers(1), Numbers(2), Numbers(3)]
    for _ in range(3):
        for part in parts:
            buffers.take(part)
            assert part.memory.tolist() == [part.value] * 8
    # A sweep comes by all parts in turn: the first ones that fit are always there.
    assert [(part.hits, part.misses) for part in parts] == [(2, 1), (2, 1), (0, 3)]
    assert buffers.allocated() == 16
    buffers.keep_at_most(8)
    for part in parts:
        buffers.take(part)
    assert [(part.hits, part.misses) for part in parts] == [(3, 1), (2, 2), (0, 4)]
    del part, parts[0]
    assert buffers.allocated() == 0


def test_what_fills_a_new_buffer_waits_for_what_the_device_was_given_before(monkeypatch):
    log = []
    monkeypatch.setattr(
        cards._Stream, "record", lambda self, stream: log.append(("record", self, stream))
    )
    monkeypatch.setattr(
        cards._Stream, "wait_event", lambda self, event: log.append(("wait", self, event))
    )
    with cards.fake_cards() as (card,):
        Buffers(8, card.device).take(Numbers(1))
    waits = [(who, event) for what, who, event in log if what == "wait"]
    filling, before = waits[0]
    recorded = [(event, stream) for what, event, stream in log if what == "record"]
    assert before in [event for event, stream in recorded if stream is not filling]
    assert ("record", waits[1][1], filling) in log[log.index(("wait", filling, before)) :]
