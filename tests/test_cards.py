"""Memory accounts of fake cards, work that goes on out of memory, and checks of real cards."""

import gc
import platform
import re
import socket
import weakref
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from transformers.integrations import hub_kernels

from card import short
from cards import fake_cards
from isingcut.evaluation import candidates
from isingcut.healing.repairs import linear, tuned
from isingcut.healing.repairs.linear import fit_patches
from isingcut.measure.packed import changed_losses
from isingcut.measure.splitting import fewer_tokens_to_fit, split_to_fit
from isingcut.models.device import (
    BatchLimit,
    allowance,
    device_module,
    pick_device,
    pick_devices,
)
from isingcut.models.placement import split_evenly
from isingcut.models.replay import reuse_freed_memory
from isingcut.models.sharing import open_cut, share
from isingcut.runs import context, evaluating
from isingcut.testing import gpu
from shared import (
    MemoryExhaustedError,
    RunConfig,
    call,
    load_json,
    parametrize,
    refuses,
    run_tiny,
    works,
)
from tiny import (
    Replay,
    StreamedReplay,
    Work,
    excise,
    gate_gradients,
    gone,
    load,
    load_tiny,
    measure,
    random_tokens,
    replay_of,
    tiny_model,
)

KILO = torch.zeros(250)


def test_the_ledger_counts_storages_once_and_gives_them_back():
    with fake_cards() as (card,):
        a = KILO.to(card.device)
        view = a[:100].view(10, 10).T
        assert card.live == 1000
        b = a + 1
        assert (card.live, card.peak) == (2000, 2000)
        del a
        assert card.live == 2000  # The view keeps the memory.
        del view
        assert card.live == 1000
        b.add_(1)
        assert (card.live, card.peak) == (1000, 2000)
        card.reset_peak()
        assert card.peak == 1000


def test_beyond_the_budget_memory_is_exhausted_in_torchs_words():
    with fake_cards(budget=2500) as (card,):
        kept = [KILO.to(card.device), KILO.to(card.device)]
        with pytest.raises(
            torch.OutOfMemoryError, match=r"allocate 1000 bytes.*of 2500 bytes"
        ):
            KILO.to(card.device)
        assert card.live == 2000
        del kept
        assert card.live == 0


def test_a_card_reports_its_memory():
    with fake_cards(2, budget=10_000) as cards:
        assert device_module(cards[0].device).device_count() == 2
        assert pick_device("lazy:1") == cards[1].device
        kept = KILO.to(cards[1].device)
        found = allowance("100%", cards[1].device)
        assert (found.used, found.left) == (1000, 9000)
        assert allowance("100%", cards[0].device).left == 10_000
        del kept
    for device in ("lazy:1", "lazy:01", "lazy:200"):
        with refuses("not on this machine"):
            pick_device(device)


def test_weights_are_placed_over_as_few_cards_as_hold_them(monkeypatch):
    one, two, three, four = (torch.device("lazy", i) for i in range(4))
    # 80 % of the free memory is used.
    with fake_cards(4, budget=10_000):
        for size, found in [
            (8_000, [torch.device("lazy")]),
            (8_001, [one, two]),
            (24_000, [one, two, three]),
            (32_001, [torch.device("lazy")]),
        ]:
            assert pick_devices("lazy", size) == found
        assert pick_devices("lazy:3,lazy:1", 1) == [four, two]
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert pick_devices("lazy", 1, cards=2) == [three, four]
        monkeypatch.delenv("LOCAL_RANK")
        monkeypatch.setenv("SLURM_LOCALID", "1")
        assert pick_devices("lazy", 1, cards=2) == [three, four]
        # A launcher that shows each process its own GPUs only.
        assert pick_devices("lazy", 1, cards=4) == [one, two, three, four]
        for device, cards in [
            ("lazy:1,lazy:1", None),
            ("lazy", 3),
            ("cpu", 2),
            ("lazy:2", 2),
        ]:
            with refuses(r"twice|needs"):
                pick_devices(device, 1, cards=cards)


class _Group:
    """Processes of which another one has the GPU ``other``."""

    size = 2

    def __init__(self, other):
        self.other = other

    def gather(self, own):
        return [self.other.encode(), own]


@parametrize(
    "present, cards, rank, number",
    [(1, None, 1, 0), (2, None, 1, 1), (4, 2, 1, 2), (2, 2, 1, 0)],
)
def test_each_process_has_a_gpu_of_its_own(
    present, cards, rank, number, monkeypatch, stub
):
    used = []
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    stub("torch.cuda.is_available", True)
    stub("torch.cuda.device_count", present)
    monkeypatch.setattr("torch.cuda.set_device", used.append)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties", lambda n: SimpleNamespace(uuid=f"GPU-{n}")
    )
    config = RunConfig(model="m", cards_per_process=cards)
    context._use_own_card(config, _Group("another GPU-9"))
    assert used == [number]
    same = f"{socket.gethostname()} GPU-{number}"
    with refuses("processes 0 and 1 have the same GPU"):
        context._use_own_card(config, _Group(same))
    context._use_own_card(config.replace(device="cpu"), _Group(""))
    assert used == [number, number]


def test_missing_kernels_are_named(shared, caplog):
    folder = shared.checkpoint("nemotron_h")
    hub_kernels.logger.warning_once.cache_clear()
    hub_kernels.logger.addHandler(caplog.handler)
    with fake_cards():
        model = load(folder, dtype="float32", device="lazy").model
        for _ in range(2):
            model(torch.arange(8, 24, device=model.device)[None], use_cache=False)
    hub_kernels.logger.removeHandler(caplog.handler)
    missing = set(re.findall("because `(.*)` is not installed", caplog.text))
    assert missing == {"causal_conv1d", "mamba_ssm"}


@parametrize("count", [2, 4])
def test_cards_have_equal_shares_of_the_memory(count, shared):
    folder = shared.checkpoint(
        hidden_size=128, intermediate_size=384, head_dim=32, num_hidden_layers=8
    )
    with fake_cards(count) as cards:
        names = ",".join(str(card.device) for card in cards)
        replay = load(folder, dtype="float32", device=names).replay
        measure(replay, random_tokens(), np.eye(8) > 0, work=Work(32))
        gate_gradients(replay, random_tokens(), work=Work(32))
        parts = [replay.model.lm_head, *replay.blocks]
        largest = max(sum(p.nbytes for p in part.parameters()) for part in parts)
    peaks = [card.peak for card in cards]
    assert max(peaks) < 1.1 * np.mean(peaks) + largest


def test_inspect_and_plan_say_where_blocks_go(shared, capsys):
    given = (shared.checkpoint(num_hidden_layers=8), "--device", "lazy:0,lazy:1")
    with fake_cards(2):
        assert call("inspect", *given) == call("plan", *given, "--length", 16) == 0
    said = capsys.readouterr().out
    assert said.count("blocks 0 to 3: lazy:0") == 1
    assert said.count("blocks 4 to 7: lazy:1") == 1
    assert "on lazy:0,lazy:1" in said


def test_parts_are_divided_in_order_by_bytes_and_by_room():
    assert split_evenly([1, 4, 4, 4, 4, 1], [1, 1]) == [0, 0, 0, 1, 1, 1]
    assert split_evenly([1, 4, 4, 4, 4, 1], [3, 1]) == [0, 0, 0, 0, 1, 1]
    assert split_evenly([90, 1, 1, 1, 1], [1, 1, 1]) == [0, 2, 2, 2, 2]


# One set of weights ---------------------------------------------------------------------------


@parametrize("tied", [True, False])
def test_a_cut_takes_the_memory_of_its_original(tied, shared, tmp_path):
    source = shared.checkpoint(tie_word_embeddings=tied)
    cut = tmp_path / "cut"
    excise(source, [1, 4], cut)
    with fake_cards() as (card,):
        original = load(source, dtype="float32", device=str(card.device))
        before = card.live
        loaded = open_cut(original, gone([1, 4]), cut)
        gc.collect()
        assert loaded.streamed is None
        # Buffers that no checkpoint stores are shared, too.
        assert card.live == before
        tokens = random_tokens([12]).input_ids.to(card.device)
        logits = loaded.model(input_ids=tokens).logits.cpu()
    alone = load_tiny(cut).model
    torch.testing.assert_close(
        logits, alone(input_ids=tokens.cpu()).logits, rtol=1e-4, atol=1e-5
    )
    assert loaded.model.num_parameters() == alone.num_parameters()


def test_what_differs_in_one_bit_is_the_cuts_own():
    original, cut = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    weight = cut.model.layers[2].mlp.down_proj.weight
    weight.view(torch.int32)[3, 5] ^= 1
    assert share(cut, original, gone([]))
    theirs = dict(original.named_parameters())
    own = [n for n, p in cut.named_parameters() if p.data_ptr() != theirs[n].data_ptr()]
    assert own == ["model.layers.2.mlp.down_proj.weight"]


def test_a_trained_tensor_is_never_shared():
    original = tiny_model("llama").requires_grad_(False)
    cut = tiny_model("llama")
    assert share(cut, original, gone([]))
    theirs = {p.data_ptr() for p in original.parameters()}
    assert all(p.data_ptr() not in theirs for p in cut.parameters())


def test_a_cut_that_is_all_its_own_is_streamed_where_it_does_not_fit(shared):
    source = shared.checkpoint()
    other = shared.checkpoint(seed=1)
    with fake_cards() as (card,):
        original = load(source, dtype="float32", device=str(card.device))
        card.budget = int(1.6 * card.live)
        loaded = open_cut(original, gone([]), other)
        assert loaded.model is loaded.streamed.model


# Out of memory is an event --------------------------------------------------------------------


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="glibc keeps freed buffers"
)
def test_freed_buffers_go_back_to_the_system():
    reuse_freed_memory()
    many = [torch.ones(25_000) for _ in range(2_000)]
    del many[:-1]
    kept = psutil.Process().memory_info().rss
    BatchLimit(many[0].device).release()
    assert psutil.Process().memory_info().rss < kept - 1e8


@parametrize("most", [1, 2, 3, 5, 8])
def test_work_is_split_until_it_fits_and_joined_in_order(most):
    limit = BatchLimit(torch.device("cpu"))
    calls = []

    def compute(batches):
        calls.append(sum(b.samples for b in batches))
        if calls[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [b.input_ids.sum(1).numpy() for b in batches]

    tokens = random_tokens([12] * 8)
    whole = tokens.input_ids.sum(1).numpy()
    batches = [tokens.select(range(5)), tokens.select(range(5, 8))]
    found = split_to_fit(limit, batches, compute, lambda a, b: np.concatenate([a, b]))
    assert [len(rows) for rows in found] == [5, 3]
    assert np.array_equal(np.concatenate(found), whole)
    failed = sum(n > most for n in calls)
    calls.clear()
    split_to_fit(limit, batches, compute, lambda a, b: np.concatenate([a, b]))
    # The size that fitted is remembered.
    assert sum(n > most for n in calls) < max(1, failed)


@parametrize(
    "error, tried",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), [4, 2, 1]),
        (RuntimeError("CUDA error"), [4]),
    ],
)
def test_what_fails_with_one_sample_or_for_another_reason_is_raised(error, tried):
    limit = BatchLimit(torch.device("cpu"))
    calls = []

    def compute(found):
        calls.append(found // 12 if isinstance(found, int) else found[0].samples)
        raise error

    with pytest.raises(type(error)):
        split_to_fit(limit, [random_tokens([12] * 4)], compute, lambda a, b: a)
    assert calls == tried
    with pytest.raises(type(error)):
        fewer_tokens_to_fit(limit, 48, 12, compute)
    assert calls == 2 * tried


STATES = np.random.default_rng(1).random((5, 6)) < 0.4


@parametrize("job", ["losses", "changed", "gradients"])
def test_a_measurement_within_less_memory_gives_the_same_numbers(job):
    tokens = random_tokens([12] * 8)

    def numbers(replay):
        if job == "losses":
            return measure(replay, tokens, STATES, work=Work(96)).kl_sums
        if job == "gradients":
            return gate_gradients(replay, tokens, work=Work(96))
        return changed_losses(
            replay, tokens, lambda _, own: 1.02 * own, Work(96), "", [1]
        )

    with fake_cards() as (card,):
        replay = replay_of(tiny_model("llama").to(card.device))
        weights = card.live
        expected = numbers(replay)
        card.budget = weights + int(0.6 * (card.peak - weights))
        found = numbers(replay)
    # For gradients, activations are recomputed first.
    assert job != "losses" or replay.limit.tokens < 96
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


WIDE = {"intermediate_size": 512}


def test_a_fit_without_room_on_its_card_is_made_on_the_host(stub):
    model = tiny_model("llama", **WIDE)
    tokens = random_tokens([14] * 24)
    (expected,) = fit_patches(replay_of(model), tokens, [3], Work(128)).patches
    with fake_cards() as (card,):
        replay = replay_of(model.to(card.device))
        # The second moments fit, but not the solution next to them.
        card.budget = card.live + 8_200_000
        found = fit_patches(replay, tokens, [3], Work(128))
        assert card.peak < card.budget
        # The same where the estimate is wrong.
        stub(linear, "bytes_of", 0)
        again = fit_patches(replay, tokens, [3], Work(128))
    assert (found.record.maps, found.record.unpatched) == ("reads", [])
    for fit in (found, again):
        torch.testing.assert_close(
            fit.patches[0].parameters, expected.parameters, rtol=1e-6, atol=1e-6
        )


FEW = {
    "remove": 2,
    "energy": "fisher",
    "states": 3,
    "random_states": 0,
    "patch": "none",
}


def test_a_run_that_runs_out_of_memory_goes_on_from_disk(
    shared, text, tmp_path, monkeypatch
):
    model = shared.checkpoint()
    out = tmp_path / "run"
    evaluate = evaluating.before_and_after
    failed = []

    def exhausted(*args, **kwargs):
        failed.append(1)
        # The second attempt reads the blocks from disk.
        if len(failed) == 2:
            return evaluate(*args, **kwargs)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(evaluating, "before_and_after", exhausted)
    given = (model, text, out)
    run_tiny(*given, **FEW)
    assert failed == [1, 1]
    streamed = load_json(out / "evaluation.json")
    stages = load_json(out / "run.json").stages
    assert [n for n, r in stages.items() if r.get("streamed")] == ["evaluation.json"]
    # Only the evaluation is made again.
    monkeypatch.setattr(evaluating, "before_and_after", evaluate)
    (out / "evaluation.json").unlink()
    run_tiny(*given, **FEW)
    assert streamed.kl == pytest.approx(load_json(out / "evaluation.json").kl, rel=1e-5)
    monkeypatch.setattr(evaluating, "before_and_after", exhausted)
    (out / "evaluation.json").unlink()
    with refuses("2,147,483,648 more bytes were needed", MemoryExhaustedError):
        run_tiny(*given, stream="off", **FEW)


@parametrize("module, step", [(linear, "fit_patches"), (tuned, "tune")])
def test_a_patch_that_runs_out_of_memory_leaves_the_model_resident(
    module, step, shared, text, tmp_path, monkeypatch
):
    with short(), fake_cards() as (card,):
        card.budget = 1 << 30
        exhausted = lambda *_, **__: torch.empty(2 << 30, device=card.device)  # noqa: E731
        monkeypatch.setattr(module, step, exhausted)
        more = {"patch": "tuned", "patch_tokens": 100, "device": str(card.device)}
        model = shared.checkpoint(num_hidden_layers=4)
        out = run_tiny(model, text, tmp_path / "run", **FEW | more)
    stages = load_json(out / "run.json").stages
    assert not any(record.get("streamed") for record in stages.values())
    patch = load_json(out / "model/isingcut.json").patch
    if step == "tune":
        assert "out of memory for tuning the patch" in patch.tuning.left_out
        assert patch.cuts
    else:
        assert "out of memory for fitting a patch" in patch.unpatched[0].reason


@pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning")
def test_ranking_that_runs_out_of_memory_goes_on_from_disk(
    shared, text, tmp_path, monkeypatch
):
    rank = candidates.rank
    replays = []
    models = []

    def exhausted(replay, *args, **kwargs):
        replays.append(type(replay))
        models.append(weakref.ref(replay.model))
        if len(replays) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        gc.collect()
        assert models[0]() is None, (
            "the first model is in memory beside the streamed one"
        )
        return rank(replay, *args, **kwargs)

    monkeypatch.setattr(candidates, "rank", exhausted)
    run_tiny(shared.checkpoint(), text, tmp_path / "run", **FEW)
    assert replays == [Replay, StreamedReplay]


def test_a_model_that_runs_out_of_memory_while_it_loads_is_streamed(
    shared, text, tmp_path, fails
):
    out = run_tiny(shared.checkpoint(), text, tmp_path / "run", **FEW)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    fails("isingcut.runs.context.models.load", error)
    works("rank", out, "--random-states", 30, "--overwrite")
    assert load_json(out / "run.json").stages["candidates.json"].streamed


def test_without_a_gpu_it_says_so(capsys, stub):
    stub("torch.cuda.device_count", 0)
    assert gpu.main(["Checks.test_twice"]) == 1
    assert "--device cuda is not on this machine" in capsys.readouterr().err


@parametrize("count, shown", [(2, "OK"), (1, "skipped 'needs two GPUs'")])
def test_checks_of_gpus_pass_on_fake_cards(count, shown, capsys, monkeypatch):
    with fake_cards(count) as cards:
        monkeypatch.setattr(gpu, "DEVICE", str(cards[0].device))
        assert gpu.main(["Checks.test_twice", "Checks.test_placed"]) == 0
    out, err = capsys.readouterr()
    assert shown in err
    assert out.count("equal bits") == (3 if count == 2 else 1)


def test_a_difference_fails_a_check(capsys, monkeypatch):
    with fake_cards() as (card,):
        monkeypatch.setattr(gpu, "DEVICE", str(card.device))
        monkeypatch.setattr(gpu.close, "__defaults__", (-1.0,))
        assert gpu.main(["Checks.test_twice"]) == 1
    assert "differs by 0.0e+00 of its size" in capsys.readouterr().err
