"""Threads and micro-batch by a measurement: with a clock that the test sets, and in a run."""

import contextlib
import gc
import weakref

import numpy as np
import pytest
import torch

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError
from isingcut.files.journal import Journal
from isingcut.measure import losses as measure_module
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models.compute import tuning
from isingcut.models.compute.tuning import Tuning, tune
from isingcut.models.device import few_threads
from isingcut.models.replay import chosen_attention
from tiny import random_tokens, tiny_replay

PLENTY = 1 << 34


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """Threads are left alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Clock:
    """Says how long a pass takes from the attention in use and the tokens that pass."""

    def __init__(self, replay, seconds):
        self.seconds, self.model, self.calls = seconds, replay.model, []
        replay.blocks[0].register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module, args, kwargs):
        stream = args[0] if args else kwargs["hidden_states"]
        attention = self.model.config._attn_implementation
        self.calls.append((attention, stream.shape[0] * stream.shape[1]))

    def __call__(self, run):
        run()
        return self.seconds(*self.calls[-1])


def test_the_micro_batch_doubles_while_that_pays_and_fits():
    def clock(replay):
        # Up to 4096 tokens a pass costs the same, as on a GPU that is not full.
        return Clock(replay, lambda name, tokens: max(1.0, tokens / 4096))

    replay = tiny_replay()
    assert tune(replay, 16, attention="sdpa", memory=PLENTY, seconds=clock(replay)) == Tuning(
        "sdpa", 4096
    )
    each = tuning._saved_bytes(replay, 16)
    assert each > len(replay) * replay.model.config.hidden_size * 4
    found = tune(replay, 16, attention="sdpa", memory=2500 * each, seconds=clock(replay))
    assert found.batch_tokens == 2048


def test_a_model_whose_graph_was_measured_is_let_go():
    def measured():
        layer = torch.nn.Linear(4, 8)
        kept = tuning.kept_bytes(layer, lambda: layer(torch.ones(2, 4)).exp())
        assert kept == 4 * 2 * (4 + 8)
        return weakref.ref(layer.weight)

    gone = measured()
    gc.collect()
    assert gone() is None


def test_what_is_given_is_taken_without_a_measurement():
    replay = tiny_replay()
    clock = Clock(replay, lambda name, tokens: 1.0)
    found = tune(replay, 16, attention="eager", batch_tokens=77, memory=PLENTY, seconds=clock)
    assert found == Tuning("eager", 77)
    assert not clock.calls


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_measurements_use_the_chosen_attention_and_agree(family):
    replay, attention = tiny_replay(family), "eager"
    tokens = random_tokens()
    states = np.eye(len(replay), dtype=bool)
    used = {None: set(), attention: set()}
    replay.blocks[0].register_forward_pre_hook(
        lambda module, args: used[replay.attention].add(replay.model.config._attn_implementation)
    )
    found = {}
    for name in used:
        replay.attention = name
        found[name] = measure(replay, tokens, states).kl_sums, gate_gradients(replay, tokens)
    assert used == {None: {"sdpa"}, attention: {attention}}
    for plain, other in zip(found[None], found[attention], strict=True):
        np.testing.assert_allclose(plain, other, rtol=1e-4, atol=1e-6)
    assert replay.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("job", ["losses", "gradients"])
def test_a_journal_made_with_another_attention_is_not_used(job, tmp_path, monkeypatch):
    replay = tiny_replay()
    tokens = TokenSet.from_rows([list(range(9, 23)), list(range(30, 41))])
    computed, put = [], Journal.put
    monkeypatch.setattr(Journal, "put", lambda self, *row: (computed.append(row), put(self, *row)))

    def work():
        computed.clear()
        if job == "losses":
            states = np.eye(len(replay), dtype=bool)
            return measure(replay, tokens, states, work=Work(journal=tmp_path / "journal")).kl_sums
        return gate_gradients(replay, tokens, work=Work(journal=tmp_path / "journal"))

    expected = work()
    assert computed
    np.testing.assert_array_equal(work(), expected)
    assert not computed, "what the same attention has measured is there"
    replay.attention = "eager"
    np.testing.assert_allclose(work(), expected, rtol=1e-4, atol=1e-6)
    assert computed


def test_an_attention_that_is_not_there_is_an_error_in_one_line():
    with (
        torch.no_grad(),
        pytest.raises(ArchitectureError, match="cannot compute attention as 'no such'"),
        chosen_attention(tiny_replay(), "no such"),
    ):
        pass


@pytest.fixture
def cores(monkeypatch):
    """A machine whose torch takes 8 threads, and nobody has said how many."""
    for name in tuning._THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    taken = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: taken[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: taken.__setitem__(0, n))
    return taken


def timed(cores, seconds):
    """A clock that says how long a pass takes with the threads in use."""

    def clock(run):
        during = []
        plain = torch.set_num_threads
        torch.set_num_threads = lambda n: (plain(n), during.append(n))
        try:
            run()
        finally:
            torch.set_num_threads = plain
        return seconds(during[0] if during else cores[0])

    return clock


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        (lambda n: 0.01 * n, 1),  # threads wait for each other
        (lambda n: 0.01 * (1 + abs(n - 2)), 2),  # two help, more do not
        (lambda n: 0.08 / n, None),  # all help
        (lambda n: 0.05 + 0.0001 * n, None),  # less than what is worth it
        (lambda n: 9.0 if n == 8 else 0.01, 1),  # others are at work on the machine
    ],
)
def test_few_threads_are_taken_where_they_clearly_win(cores, seconds, chosen):
    found = tune(
        tiny_replay(),
        16,
        attention="sdpa",
        batch_tokens=64,
        memory=0,
        seconds=timed(cores, seconds),
    )
    assert found == Tuning("sdpa", 64, chosen)
    assert cores == [8]


@pytest.mark.parametrize("said", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", ""])
def test_threads_of_a_large_model_and_those_that_are_named_are_left_alone(cores, monkeypatch, said):
    if said:
        monkeypatch.setenv(said, "8")
    else:
        monkeypatch.setattr(tuning, "_SMALL_WORK", 1e5)
    clock = timed(cores, lambda n: pytest.fail("timed"))
    found = tune(tiny_replay(), 16, attention="sdpa", batch_tokens=64, memory=0, seconds=clock)
    assert found == Tuning("sdpa", 64, None)


@pytest.mark.parametrize(("most", "during"), [(None, 8), (3, 3), (8, 8), (64, 8)])
def test_threads_are_limited_for_a_while_and_never_raised(cores, most, during):
    with contextlib.suppress(ZeroDivisionError), few_threads(most):
        assert torch.get_num_threads() == during
        raise ZeroDivisionError
    assert torch.get_num_threads() == 8


@pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning")
def test_a_run_records_its_threads_and_goes_on_with_them(cores, llama, text, tmp_path, monkeypatch):
    import isingcut
    from isingcut.files.writing import read_json

    monkeypatch.setattr(tuning, "_threads", lambda run, seconds: 2)
    used = []
    plain = measure_module.measure

    def look(*args, **options):
        used.append(torch.get_num_threads())
        return plain(*args, **options)

    monkeypatch.setattr("isingcut.evaluation.candidates.measure", look)
    options = {
        "model": str(llama), "remove": 2, "calibration": str(text),
        "out": str(tmp_path / "run"), "samples": 3, "length": 16, "rank_samples": 3,
        "report_samples": 2, "random_states": 30, "energy": "pairwise", "dtype": "float32",
    }  # fmt: skip
    isingcut.prune(**options)
    record = read_json(tmp_path / "run" / "run.json", "run")["provenance"]["computed"]["cpu"]
    assert record["threads"] == 2
    # Another machine's choice, later.
    monkeypatch.setattr(tuning, "_threads", lambda run, seconds: pytest.fail("timed again"))
    isingcut.prune(**{**options, "remove": 3})
    assert set(used) == {2}
    assert len(used) >= 2
    assert torch.get_num_threads() == 8
