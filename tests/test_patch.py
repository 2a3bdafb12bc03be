"""The closed-form patch: what it solves, which layer absorbs it, what is refused."""

import copy
import dataclasses
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from healings import shapes, stored
from isingcut.healing.job import Job
from isingcut.healing.patch import ridge
from isingcut.healing.patch.files import apply_patches
from isingcut.healing.patch.layers import (
    find_scaled_writes,
    find_write,
    observe,
    token_gains,
)
from isingcut.healing.patch.ridge import Moments, Rows, bytes_of, fit_ridge
from isingcut.healing.repairs import linear
from isingcut.healing.repairs.base import patch_checkpoint
from isingcut.healing.repairs.linear import _Fitting, fit_patches
from isingcut.measure.streams import Kept
from isingcut.models.device import Allowance
from isingcut.models.replay import Recording
from isingcut.models.streaming.reader import StoredPart
from isingcut.testing.tiny import FAMILIES
from shared import ArchitectureError, HealConfig, cells, parametrize, refuses
from tiny import (
    TokenSet,
    Work,
    excise,
    find_stack,
    gone,
    load_streamed,
    load_tiny,
    replay_of,
    skip_blocks,
    stack_modules,
    streamed,
    tiny_checkpoint,
    tiny_model,
    tiny_replay,
)


def tokens(samples=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(8, 262, (samples, 24), generator=generator).tolist()
    return TokenSet.from_rows([row[: 24 - 3 * (i % 3)] for i, row in enumerate(rows)])


def fitted(model, removed, text, *, reads=True):
    """Return patches that map a layer's inputs, or its outputs, as with little memory."""
    with mock.patch.object(_Fitting, "ways", (reads,)):
        return fit_patches(replay_of(model), text, removed, Work(96)).patches


@contextmanager
def watched(model, block, path=""):
    """Record the block's output, and the layer's input and output, in a forward pass."""
    found = {}
    module = stack_modules(model)[block]

    def inner(m, args, output):
        found["read"] = args[0].double()
        found["written"] = output.double()

    def outer(m, args, output):
        found["stream"] = (output[0] if isinstance(output, tuple) else output).double()

    with ExitStack() as stack:
        if path:
            layer = module.get_submodule(path)
            stack.callback(layer.register_forward_hook(inner).remove)
        stack.callback(module.register_forward_hook(outer).remove)
        yield found


def streams(model, text, block):
    """Return the output of a block, (tokens, D), for real tokens only."""
    with watched(model, block) as found, torch.no_grad():
        model(text.input_ids, use_cache=False)
    return found["stream"][text.mask]


@parametrize("kind", [Moments, Rows])
def test_ridge_solution_satisfies_the_normal_equations(kind):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(60, 5)
    weights = torch.rand(60, generator=generator, dtype=torch.float64)[:, None] + 0.1
    t = x @ normal(5, 3) + 2.0 * normal(60, 3)
    fit, held = (kind(5, 3, torch.device("cpu")) for _ in range(2))
    for side, rows in ((fit, slice(0, 40)), (held, slice(40, 60))):
        side.add(x[rows], t[rows], weights[rows, 0])
    alone = copy.deepcopy(fit)
    found = fit_ridge(fit, held)
    wrong = t[40:] - x[40:] @ alone.map(found.strength).T
    squares = [(weights[40:] * each**2).sum() for each in (wrong, t[40:])]
    assert found.held_out == pytest.approx(float(squares[0] / squares[1]))
    assert 0 < found.held_out < 1
    # The map is of all rows: its residuals are balanced by the ridge.
    size = found.strength * (weights * x**2).sum(0).mean()
    left = (weights * (t - x @ found.map.T)).T @ x
    torch.testing.assert_close(left, size * found.map, rtol=1e-3, atol=1e-4)


def test_a_strength_too_small_for_float32_is_compared_in_float64(monkeypatch):
    monkeypatch.setattr(ridge, "STRENGTHS", (1e-8,))
    sides = [Moments(2, 1, torch.device("cpu")) for _ in range(2)]
    for side in sides:
        # Equal features: only the ridge makes the matrix regular.
        side.add(torch.ones(4, 2), torch.ones(4, 1), torch.ones(4))
    found = fit_ridge(*sides)
    torch.testing.assert_close(found.map, torch.full((1, 2), 0.5).double())


def test_a_tenth_of_a_fit_is_in_float64_at_most():
    """Counted on the shapes of SmolLM2 and 16,384 tokens, all divided by 16."""

    class Flops(TorchDispatchMode, Counter):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found = op(*args, **kwargs or {})
            if str(op).startswith(("aten.mm", "aten.linalg_chol", "aten.cholesky_s")):
                share = 1 / 3 if "linalg" in str(op) else 2
                self[args[0].dtype] += share * args[0].numel() * args[-1].shape[-1]
            return found

    x = torch.randn(1024, 96, generator=torch.Generator().manual_seed(0))
    sides = [Moments(96, 36, torch.device("cpu")) for _ in range(2)]
    with Flops() as flops:
        for side, rows in zip(sides, x.split(768), strict=True):
            side.add(rows, rows[:, :36], torch.ones(len(rows)))
        fit_ridge(*sides)
    assert flops[torch.float64] < 0.1 * flops.total()


def test_useless_features_give_no_map():
    generator = torch.Generator().manual_seed(2)
    sides = []
    for _ in range(2):
        side = Moments(4, 2, torch.device("cpu"))
        x = torch.randn(8, 4, generator=generator)
        side.add(x, torch.randn(8, 2, generator=generator), torch.ones(8))
        sides.append(side)
    # Opposite targets on the two halves: a fit to one is wrong for the other.
    sides[1].xx = sides[0].xx
    sides[1].tx = -sides[0].tx
    assert fit_ridge(sides[0], sides[1]) is None


@parametrize("reads", [True, False])
def test_one_cut_solves_its_least_squares_problem(reads):
    model = tiny_model("llama")
    text = tokens()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (patch,) = fitted(model, [2, 3], text, reads=reads)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert (patch.block, patch.path) == (1, "mlp.down_proj")
    assert patch.parameters.keys() == {"weight"}
    assert patch.record.tokens == int(text.mask.sum())
    assert_stationary(model, text, patch, reads=reads)


def assert_stationary(model, text, patch, removed=(), patches=(), *, reads=True):
    """Check that the objective's gradient vanishes at the fitted map, given earlier patches."""
    target = streams(model, text, patch.record.removed[-1])
    with (
        apply_patches(replay_of(model), list(patches)),
        skip_blocks(model, removed),
        watched(model, patch.block, patch.path) as seen,
        torch.no_grad(),
    ):
        model(text.input_ids, use_cache=False)
    x = seen["read" if reads else "written"][text.mask]
    out = seen["stream"][text.mask]
    weights = 1 / target.square().mean(-1)
    weight = model.model.layers[patch.block].get_submodule(patch.path).weight.double()
    change = patch.parameters["weight"] - weight
    if not reads:
        # W' = (1 + T) W, and W has full row rank.
        change = change @ torch.linalg.pinv(weight)
    ridge = patch.record.ridge * torch.diagonal((x * weights[:, None]).T @ x).mean()
    left = (target - out - x @ change.T) * weights[:, None]
    torch.testing.assert_close(left.T @ x, ridge * change, rtol=1e-3, atol=1e-3)


def test_later_cuts_are_fitted_on_the_model_patched_so_far():
    model = tiny_model("llama")
    text = tokens()
    first, second = fitted(model, [1, 4], text)
    assert_stationary(model, text, second, [1], [first])


@parametrize(
    "removed, reason",
    [
        ([0, 1], "^block 0 is removed"),
        (
            [0, 2],
            "^block 0 is removed, .*; block 1 .* cannot absorb a patch: .* shared",
        ),
    ],
)
def test_a_state_without_a_cut_to_patch_is_refused_with_the_reasons(removed, reason):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
        layer.self_attn.o_proj.weight = model.model.layers[0].self_attn.o_proj.weight
    with refuses(reason, ArchitectureError):
        fitted(model, removed, tokens())


def job_of(folder, family, removed, **options):
    source = tiny_checkpoint(family, folder / "source", **options)
    excise(source, removed, folder / "cut")
    return Job(
        load_tiny(source),
        gone(removed),
        folder / "cut",
        tokens(32),
        folder / "work",
        HealConfig(patch="linear", patch_tokens=4096),
    )


def test_a_cut_that_no_map_helps_is_listed_and_the_others_go_on(monkeypatch):
    model = tiny_model("llama")
    calls = []

    def first_fails(fit, held_out, left):
        calls.append(fit)
        if len(calls) == 1:
            return None
        return fit_ridge(fit, held_out, left)

    monkeypatch.setattr(linear, "fit_ridge", first_fails)
    found = fit_patches(replay_of(model), tokens(), [2, 4], Work(96))
    (left,) = found.record.unpatched
    assert left.removed == [2, 2]
    assert left.reason.startswith("no linear map in mlp.down_proj of block 1 lo")
    (alone,) = found.patches
    # The other patch is fitted on the cut model without a patch for the first cut.
    assert_stationary(model, tokens(), alone, [2])


@parametrize("family", ["llama", "gemma2"])
def test_states_share_the_original_and_the_cuts_before_they_differ(family, spy):
    replay = tiny_replay(family)
    kept = Kept()
    ran = spy(Recording, "block", lambda found, recording, i, stream: i)
    # The first needs fewer blocks than the others.
    for removed in ([2], [1, 4], [2, 4]):
        alone = fit_patches(replay, tokens(), removed, Work(96)).patches
        ran.clear()
        again = fit_patches(replay, tokens(), removed, Work(96), None, kept).patches
        for one, other in zip(alone, again, strict=True):
            assert one.record == other.record
            assert torch.equal(one.parameters["weight"], other.parameters["weight"])
    # Behind the shared cut, and without the original's blocks.
    assert {*ran} == {3}


@parametrize("family", ["llama", "gemma2"])
def test_an_original_that_is_streamed_is_read_once_and_gives_the_same_patch(
    family, tmp_path, spy
):
    removed = (0, 2, 3)
    job = job_of(tmp_path, family, removed)
    expected = patch_checkpoint(job, tmp_path / "in-memory")
    assert [cut.removed for cut in expected.cuts] == [[2, 3]]
    assert [cut.removed for cut in expected.unpatched] == [[0, 0]]
    teacher = load_streamed(tmp_path / "source", dtype="float32", device="cpu")
    read = spy(StoredPart, "fill", lambda found, stored, buffer: stored.part)
    fit_patches(teacher.streamed, tokens(32), removed, Work(96))
    # Block 0 may be read ahead; blocks after the last cut are not needed. The block that is patched
    # is read again when its target is known.
    assert [read.count(i) for i in range(1, 6)] == [2, 1, 1, 0, 0]
    job = dataclasses.replace(job, teacher=teacher)
    assert patch_checkpoint(job, tmp_path / "streamed") == expected
    a, b = (tmp_path / n / "model.safetensors" for n in ("in-memory", "streamed"))
    assert a.read_bytes() == b.read_bytes()


def test_what_a_layer_writes_is_mapped_where_memory_has_no_room_for_what_it_reads(
    tmp_path, stub
):
    job = job_of(tmp_path, "llama", (2, 3))
    name = "model.layers.1.mlp.down_proj.weight"
    width = job.teacher.model.config.hidden_size
    before = job.teacher.model.get_parameter(name).detach().double()

    def outside_row_space(folder):
        weight = load_file(folder / "model.safetensors")[name].double()
        return float((weight - weight @ torch.linalg.pinv(before) @ before).abs().max())

    assert patch_checkpoint(job, tmp_path / "reads").maps == "reads"
    assert outside_row_space(tmp_path / "reads") > 1e-3
    stub(linear, "allowance", Allowance(bytes_of(width, width), 0))
    record = patch_checkpoint(job, tmp_path / "writes")
    assert record.maps == "writes"
    assert record.cuts[0].held_out_error_left < 1
    # W' = (1 + T) W.
    assert outside_row_space(tmp_path / "writes") < 1e-5


def test_a_cut_without_memory_for_its_fit_is_listed_and_the_others_go_on(monkeypatch):
    # For the map of inputs, that of outputs, and the message.
    rooms = [0, 0, 0]
    room = lambda *given: Allowance(rooms.pop() if rooms else 1 << 40, 0)  # noqa: E731
    monkeypatch.setattr(linear, "allowance", room)
    found = fit_patches(tiny_replay(), tokens(), [2, 4], Work(96))
    (cut,) = found.record.unpatched
    assert cut.removed == [2, 2]
    words = "fitting a map of mlp.down_proj needs 0.0 GB of host memory, and 0.0 GB"
    assert words in cut.reason
    assert [patch.record.removed for patch in found.patches] == [[4, 4]]


def test_more_tokens_than_memory_next_to_a_streamed_model_are_refused(tmp_path, stub):
    source = tiny_checkpoint("llama", tmp_path / "source")
    replay = streamed(source)
    stub(type(replay), "room", 10_000)
    with refuses(r"on 252 tokens needs .* free; lower --patch-tokens"):
        fit_patches(replay, tokens(), [3], Work(96))


# Family :: the layer that is patched, if it is known.
LAYERS = """
llama :: mlp.down_proj
gpt2 :: mlp.c_proj
gpt_neox :: mlp.dense_4h_to_h
phi3 :: mlp.down_proj
mamba2 :: mixer.out_proj
nemotron_h ::
gemma3 ::
olmo2 ::
qwen3_moe ::
gpt_oss ::
rwkv ::
"""


@parametrize("family, path", cells(LAYERS))
def test_the_written_checkpoint_is_plain_and_computes_the_patch(family, path, tmp_path):
    removed = (3,) if family == "nemotron_h" else (2, 3)
    record = patch_checkpoint(job_of(tmp_path, family, removed), tmp_path / "patched")
    assert [c.removed for c in record.cuts] == [[removed[0], removed[-1]]]
    assert record.cuts[0].held_out_error_left < 1
    layer = record.cuts[0].layer
    assert layer == path or not path
    places = (tmp_path / "cut", tmp_path / "patched")
    before, after = map(stored, places)
    assert shapes(places[0]) == shapes(places[1])
    changed = {n for n in before if before[n] != after[n]}
    assert {n.rsplit(".", 1)[1] for n in changed} <= {"weight", "bias"}
    assert all(n.rsplit(".", 1)[0].endswith(layer) for n in changed)
    assert changed
    assert len({load_tiny(place).model.num_parameters() for place in places}) == 1


def write_of(model):
    """Return how the first block of a model absorbs a map, if it does."""
    with torch.no_grad():
        recording = replay_of(model).record(tokens().input_ids[:2, :8])
        return find_write(recording, 0, recording.entered, find_stack(model).kinds[0])


def test_the_scale_of_a_family_is_found(monkeypatch):
    own = {"head_dim": None, "residual_multiplier": 0.5}
    monkeypatch.setitem(FAMILIES, "granite", own)
    model = tiny_model("granite")
    assert write_of(model).scale == pytest.approx(0.5, rel=1e-5)
    text = tokens(16)
    (patch,) = fitted(model, [3], text)
    assert block_error(model, [patch], 2, 3, text) < block_error(model, [], 2, 3, text)


@parametrize("family", ["llama", "gemma2", "mixtral"])
def test_half_precision_does_not_hide_who_absorbs(family):
    model = tiny_model(family).to(torch.bfloat16)
    # One channel of the stream far larger than the others, as in large models.
    model.get_input_embeddings().weight.data[:, 5] = 300.0
    assert (write_of(model) is not None) == (family == "llama")


@parametrize("family", ["gemma2", "mixtral"])
def test_half_precision_does_not_hide_gains(family):
    left = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(family)
        # A residual stream so large that additions to it are rounded to a few steps.
        model.get_input_embeddings().weight.data *= 40
        (patch,) = fitted(model.to(dtype), [2], tokens(64))
        left.append(patch.record.held_out_error_left)
    assert left[1] == pytest.approx(left[0], rel=0.03)


def block_error(model, patches, p, last, text):
    """Return weighted squared errors of block p's output against the original's after the cut."""
    original = streams(model, text, last)
    with apply_patches(replay_of(model), patches):
        left = original - streams(model, text, p)
    return float((left.square().sum(-1) / original.square().mean(-1)).sum())


GAINED = [
    "gemma2",
    "gemma3",
    "olmo2",
    "exaone4",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "rwkv",
]


@parametrize(
    "family, reads",
    # What a layer writes is mapped alike in all families.
    [*((f, True) for f in GAINED), *((f, False) for f in GAINED[::4])],
)
def test_blocks_that_answer_by_gains_are_patched_and_judged_by_what_they_compute(
    family, reads, monkeypatch
):
    model = tiny_model(family)
    text = tokens(64)

    # The map of the fitting rows only; the record has its error on the other rows.
    def fit_alone(fit, *given):
        rows = copy.deepcopy(fit)
        found = fit_ridge(fit, *given)
        return found and dataclasses.replace(found, map=rows.map(found.strength))

    with monkeypatch.context() as only:
        only.setattr(linear, "fit_ridge", fit_alone)
        (patch,) = fitted(model, [2], text, reads=reads)
    assert patch.record.exact is False
    held = text.select(range(3, 64, 4))
    plain = block_error(model, [], 1, 2, held)
    left = block_error(model, [patch], 1, 2, held) / plain
    assert left == pytest.approx(patch.record.held_out_error_left, rel=1e-4)
    assert left < 1
    (patch,) = fitted(model, [2], text, reads=reads)
    errors = [block_error(model, p, 1, 2, tokens(32, seed=5)) for p in ([patch], [])]
    assert errors[0] < errors[1]


def test_gains_are_those_of_the_norm_behind_the_layer():
    replay = tiny_replay("olmo2")
    block = replay.blocks[1]
    with torch.no_grad():
        recording = replay.record(tokens(64).input_ids)
        entered = recording.block(0, recording.entered)
        gained = find_scaled_writes(recording, 1, entered)[0]
        _, _, written = observe(recording, 1, entered, gained)
        found = (
            token_gains(recording, 1, entered, gained, written)[..., None]
            * gained.gains
        )
        rms = written.square().mean(-1, keepdim=True).sqrt()
    expected = block.post_feedforward_layernorm.weight.detach().double() / rms.double()
    assert gained.path == "mlp.down_proj"
    # A change along the norm's input does not change its output, so a gain is an approximation.
    assert float(((found - expected) / expected).abs().median()) < 0.05


def test_a_block_without_a_useful_layer_is_refused(stub):
    stub(linear, "find_scaled_writes", [])
    words = (
        r"block 1 \(attention\+moe\) cannot absorb a patch: none of its linear layers"
    )
    with refuses(words, ArchitectureError):
        fitted(tiny_model("mixtral"), [2], tokens())


@parametrize("family", ["llama", "olmo2"])
def test_removing_a_block_that_changes_nothing_leaves_nothing_to_patch(family):
    model = tiny_model(family)
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[2].get_submodule(name).weight.zero_()
    with refuses(
        "map in mlp.down_proj( or self_attn.o_proj)? of block 1 lowers the error",
        ArchitectureError,
    ):
        fitted(model, [2], tokens())
