"""The benchmarks' plug-in: merged blocks against models whose weights were really changed."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from calls import counted
from isingcut.baselines import registry
from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError, InputError
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.replay import Replay
from tiny import tiny_model, without

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import _sliding_windows as swm
from _merging import Merged, check_mergeable, measure_merged
from _sliding_windows import SlidingWindowMerging

WORK = Work(batch_tokens=30)
GROUPS = ((1, 2, 3), (4, 5))


def make(family: str = "llama") -> Replay:
    model = tiny_model(family).requires_grad_(False)
    return Replay(model, stack_modules(model, find_stack(model)))


def samples() -> TokenSet:
    rng = np.random.default_rng(0)
    return TokenSet.from_rows([rng.integers(8, 200, k).tolist() for k in (14, 9, 14, 11)])


def really_merged(replay, groups):
    """A copy of the model with summed weights and fewer blocks, by state dicts."""
    model = copy.deepcopy(replay.model)
    blocks = stack_modules(model, find_stack(model))
    for base, *others in groups:
        weights = blocks[base].state_dict()
        for name, weight in weights.items():
            weights[name] = weight + sum(blocks[k].state_dict()[name] - weight for k in others)
        blocks[base].load_state_dict(weights)
    return without(model, sorted(k for _, *others in groups for k in others))


def each(tokens):
    """Unpadded ids (1, T) of every sample."""
    return [tokens.input_ids[s : s + 1, : int(tokens.mask[s].sum())] for s in range(tokens.samples)]


def test_merging_adds_differences_and_gives_every_bit_back():
    replay = make()
    before = {k: v.clone() for k, v in replay.model.state_dict().items()}
    tensors = [id(p) for p in replay.model.parameters()]
    merged = Merged(replay, GROUPS)
    assert merged.removed.tolist() == [False, False, True, True, False, True]
    for _ in range(2):
        with merged:
            name = "mlp.up_proj.weight"
            one, two, three = (before[f"model.layers.{i}.{name}"] for i in (1, 2, 3))
            got = replay.blocks[1].get_parameter(name)
            torch.testing.assert_close(got, one + (two - one) + (three - one))
            untouched = replay.blocks[2].get_parameter(name)
            assert torch.equal(untouched, two)
        after = replay.model.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())
    with pytest.raises(RuntimeError, match="stop"), merged:
        raise RuntimeError("stop")
    after = replay.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert [id(p) for p in replay.model.parameters()] == tensors


def test_merging_keeps_the_number_format():
    replay = make()
    replay.model.to(torch.bfloat16)
    before = replay.blocks[1].mlp.up_proj.weight.clone()
    with Merged(replay, [(1, 2)]):
        assert replay.blocks[1].mlp.up_proj.weight.dtype == torch.bfloat16
        assert not torch.equal(replay.blocks[1].mlp.up_proj.weight, before)
    assert torch.equal(replay.blocks[1].mlp.up_proj.weight, before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_merged_model_is_measured_against_the_original(family):
    replay, tokens = make(family), samples()
    changed = really_merged(replay, GROUPS)
    kl, nll = [], []
    for ids in each(tokens):
        with torch.no_grad():
            old = replay.model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            new = changed(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        kl.append(float(F.kl_div(new, old, log_target=True, reduction="sum")))
        nll.append(float(F.nll_loss(new, ids[0, 1:], reduction="sum")))
    found = measure_merged(replay, tokens, GROUPS, batch_tokens=30)
    np.testing.assert_allclose(found.kl_sums, [kl], rtol=1e-4)
    np.testing.assert_allclose(found.nll_sums, [nll], rtol=1e-5)
    assert found.kl_se.shape == (1,)
    assert found.blocks_run == 6 + 2
    assert found.states.tolist() == [[False, False, True, True, False, True]]


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("qwen2_moe", "blocks 0 and 1 cannot be merged.*mlp"),
        ("nemotron_h", "blocks 0 and 1 cannot be merged.*None in the"),
    ],
)
def test_blocks_of_other_shapes_are_refused_with_the_reason(family, words):
    with pytest.raises(ArchitectureError, match=words):
        SlidingWindowMerging().choose(make(family), samples(), 2, WORK, seed=0)


def test_shared_and_packed_weights_are_refused():
    replay = make()
    replay.blocks[3].mlp = replay.blocks[2].mlp
    with pytest.raises(ArchitectureError, match=r"blocks 2 and 3 .* the same tensor"):
        check_mergeable(replay)
    replay = make()
    for block in replay.blocks:
        packed = torch.zeros(48, 32, dtype=torch.int8)
        block.mlp.up_proj.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ArchitectureError, match="int8"):
        check_mergeable(replay)


def test_a_streamed_model_is_refused(monkeypatch):
    monkeypatch.setattr(Replay, "streamed", True)
    replay = make()
    with pytest.raises(ArchitectureError, match="--stream off"):
        check_mergeable(replay)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([(1,)], "two blocks or more"),
        ([(1, 2), (2, 3)], "no block twice"),
        ([(4, 6)], "no block 6"),
    ],
)
def test_groups_that_are_no_merge_are_refused(groups, words):
    with pytest.raises(InputError, match=words):
        Merged(make(), groups)


# sliding windows --------------------------------------------------------------------------


def similarity(replay, tokens, groups):
    """Cosine of the last hidden states, mean over tokens, of really merged models."""
    model = really_merged(replay, groups)
    cosines = []
    for ids in each(tokens):
        with torch.no_grad():
            old, new = (
                m(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0]
                for m in (replay.model, model)
            )
        cosines.append(F.cosine_similarity(old, new, dim=-1))
    return float(torch.cat(cosines).mean())


def slide(replay, tokens, threshold):
    """The groups at a threshold, window by window on really merged models."""
    closed, window = [], [5]
    for block in range(4, -1, -1):
        if similarity(replay, tokens, [*closed, [block, *window]]) >= threshold:
            window = [block, *window]
        else:
            closed += [window] if len(window) > 1 else []
            window = [block]
    return [*closed, window] if len(window) > 1 else closed


def test_the_plug_in_is_found_by_its_name_and_repeats_itself():
    part = registry.get("sliding-window-merging")()
    first, again = (part.choose(make(), samples(), 3, WORK, seed=s) for s in (0, 1))
    assert first == again
    assert len(first.removed) == 3
    for remove in (0, 6):
        with pytest.raises(InputError, match=f"cannot remove {remove} of 6"):
            part.choose(make(), samples(), remove, WORK, seed=0)


@pytest.mark.parametrize("remove", [1, 3])
def test_windows_slide_down_while_the_last_hidden_states_stay_similar(remove):
    replay, tokens = make(), samples()
    found = SlidingWindowMerging().choose(replay, tokens, remove, WORK, seed=0)
    assert found.info["exact"]
    assert found.info["merges"] == slide(replay, tokens, found.info["threshold"] - 1e-5)
    expected = similarity(replay, tokens, found.merges)
    assert found.info["similarity"] == pytest.approx(expected, rel=1e-4)
    assert found.removed == tuple(sorted(k for g in found.merges for k in g[1:]))


def test_a_few_samples_decide_and_are_what_is_paid_for():
    replay, tokens = make(), samples()
    one = SlidingWindowMerging(samples=1).choose(replay, tokens, 2, WORK, seed=0)
    alone = SlidingWindowMerging().choose(replay, tokens.select([0]), 2, WORK, seed=0)
    assert one.merges == alone.merges
    assert one.passes == pytest.approx(alone.passes * 14 / 48)
    with pytest.raises(InputError, match="samples must be at least 1"):
        SlidingWindowMerging(samples=0).choose(replay, tokens, 2, WORK, seed=0)


def test_the_ends_can_be_left_alone():
    replay, tokens = make(), samples()
    found = SlidingWindowMerging(keep_ends=True).choose(replay, tokens, 3, WORK, seed=0)
    assert found.merges == ((1, 2, 3, 4),)
    with pytest.raises(InputError, match="1 to 3"):
        SlidingWindowMerging(keep_ends=True).choose(replay, tokens, 4, WORK, seed=0)


def test_merging_stops_at_the_number_where_no_threshold_gives_it(monkeypatch):
    monkeypatch.setattr(swm._Trials, "_measure", lambda self, groups: 0.5)
    found = SlidingWindowMerging().choose(make(), samples(), 2, WORK, seed=0)
    # All merges are as similar as each other: a threshold takes all or none of them.
    assert not found.info["exact"]
    assert found.info["threshold"] == 0.5
    assert found.merges == ((3, 4, 5),)


def test_a_model_without_an_output_head_is_refused(monkeypatch):
    replay = make()
    monkeypatch.setattr(replay.model, "get_output_embeddings", lambda: None)
    with pytest.raises(ArchitectureError, match="no output head"):
        SlidingWindowMerging().choose(replay, samples(), 2, WORK, seed=0)


def test_an_interrupted_search_goes_on_with_the_same_result_and_price(tmp_path):
    replay, tokens = make(), samples()
    work = Work(batch_tokens=30, journal=tmp_path / "j")
    part = SlidingWindowMerging()
    first = part.choose(replay, tokens, 3, work, seed=0)
    assert part.choose(replay, tokens, 3, WORK, seed=0) == first
    ran = []
    handle = replay.blocks[0].self_attn.register_forward_hook(lambda m, a, o: ran.append(1))
    assert part.choose(replay, tokens, 3, work, seed=0) == first
    handle.remove()
    assert not ran, "nothing is measured twice"


@pytest.mark.parametrize("keep_ends", [False, True])
def test_merged_models_are_paid_for_from_their_first_merged_block_on(keep_ends):
    replay, tokens, calls = counted()
    found = SlidingWindowMerging(keep_ends=keep_ends).choose(replay, tokens, 3, WORK, seed=0)
    assert found.passes == pytest.approx(calls.passes)
    assert found.heads == 0, "final hidden states need the norm before the head, and no head"
