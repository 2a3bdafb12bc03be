"""Which layer of a family absorbs a patch, exactly or nearly, and which blocks take none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from isingcut.errors import ArchitectureError
from isingcut.healing.patch import linear
from isingcut.healing.patch.files import apply_patches
from isingcut.healing.patch.layers import find_write, gained_writes, observe, token_gains
from isingcut.healing.patch.linear import Moments
from isingcut.models.architectures.blocks import find_stack, stack_modules
from isingcut.testing.tiny import FAMILIES, tiny_model
from patching import fitted, tokens
from tiny import replay_of

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

import make_patches as patches


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("gpt2", "mlp.c_proj"),
        ("gpt_neox", "mlp.dense_4h_to_h"),
        ("phi3", "mlp.down_proj"),
        ("mamba2", "mixer.out_proj"),
    ],
)
def test_families_that_absorb(family, path):
    model, text = tiny_model(family), tokens(16)
    (patch,) = fitted(model, [3], text)
    assert patch.path == path
    assert block_error(model, [patch], 2, 3, text) < block_error(model, [], 2, 3, text)


def test_the_scale_of_a_family_is_found(monkeypatch):
    monkeypatch.setitem(FAMILIES, "granite", {"head_dim": None, "residual_multiplier": 0.5})
    model = tiny_model("granite")
    stack, replay = find_stack(model), replay_of(model)
    with torch.no_grad():
        recording = replay.record(tokens().input_ids[:2, :8])
        write = find_write(recording, replay.blocks[0], 0, recording.entered, stack.kinds[0])
    assert write.scale == pytest.approx(0.5, rel=1e-5)
    text = tokens(16)
    (patch,) = fitted(model, [3], text)
    assert block_error(model, [patch], 2, 3, text) < block_error(model, [], 2, 3, text)


def test_half_precision_does_not_hide_who_absorbs():
    model = tiny_model("llama").to(torch.bfloat16)
    # One channel of the stream far larger than the others, as in large models.
    model.get_input_embeddings().weight.data[:, 5] = 300.0
    (patch,) = fitted(model, [3], tokens())
    assert (patch.path, patch.record.exact) == ("mlp.down_proj", True)
    for family in ("gemma2", "mixtral"):
        model = tiny_model(family).to(torch.bfloat16)
        model.get_input_embeddings().weight.data[:, 5] = 300.0
        stack, replay = find_stack(model), replay_of(model)
        with torch.no_grad():
            recording = replay.record(tokens().input_ids[:2, :8])
            entered = recording.entered
            assert find_write(recording, replay.blocks[0], 0, entered, stack.kinds[0]) is None


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_half_precision_does_not_hide_gains(family):
    left = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(family)
        # A stream so large that what is written to it is rounded to a few steps.
        model.get_input_embeddings().weight.data *= 40
        (patch,) = fitted(model.to(dtype), [2], tokens(64))
        left.append(patch.record.held_out_error_left)
    assert left[1] == pytest.approx(left[0], rel=0.03)


def block_error(model, patches, p, last, text):
    """Weighted squares between the original's stream after a cut and that after block p."""
    found = {}
    blocks = stack_modules(model, find_stack(model))

    def keep(name):
        def hook(m, args, output):
            found[name] = (output[0] if isinstance(output, tuple) else output).double()

        return hook

    def run(name, block):
        handle = blocks[block].register_forward_hook(keep(name))
        with torch.no_grad():
            model(text.input_ids, use_cache=False)
        handle.remove()

    run("original", last)
    with apply_patches(blocks, patches):
        run("patched", p)
    left = (found["original"] - found["patched"]).square().sum(-1)
    return float((left / found["original"].square().mean(-1))[text.mask].sum())


APPROXIMATE = [
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


@pytest.mark.parametrize("family", APPROXIMATE)
@pytest.mark.parametrize("reads", [True, False])
def test_blocks_that_answer_by_gains_are_patched_and_judged_by_what_they_compute(
    family, reads, monkeypatch
):
    model, text = tiny_model(family), tokens(64)
    # The map of the rows to fit alone, whose error on the others the record tells.
    with monkeypatch.context() as only:
        only.setattr(Moments, "absorb", lambda fit, held: None)
        (patch,) = fitted(model, [2], text, reads=reads)
    assert patch.record.exact is False
    held = text.select(range(3, 64, 4))
    plain = block_error(model, [], 1, 2, held)
    left = block_error(model, [patch], 1, 2, held) / plain
    assert left == pytest.approx(patch.record.held_out_error_left, rel=1e-4)
    assert left < 1
    (patch,) = fitted(model, [2], text, reads=reads)
    unseen = tokens(32, seed=5)
    assert block_error(model, [patch], 1, 2, unseen) < block_error(model, [], 1, 2, unseen)


def test_gains_are_those_of_the_norm_behind_the_layer():
    model = tiny_model("olmo2")
    replay = replay_of(model)
    block = replay.blocks[1]
    with torch.no_grad():
        recording = replay.record(tokens(64).input_ids)
        entered = recording.block(0, recording.entered)
        gained = gained_writes(recording, block, 1, entered)[0]
        _, _, written = observe(recording, 1, entered, gained.write)
        found = token_gains(recording, 1, entered, gained, written)[..., None] * gained.channels
        rms = written.square().mean(-1, keepdim=True).sqrt()
    expected = block.post_feedforward_layernorm.weight.detach().double() / rms.double()
    assert gained.write.path == "mlp.down_proj"
    # The norm answers along the direction of what it is given not at all: a gain is no more.
    assert float(((found - expected) / expected).abs().median()) < 0.05


def test_a_layer_behind_experts_that_leaves_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(linear._Fitting, "_error", lambda *_: 1.0)
    reason = r"no map of block 1's mlp.down_proj or self_attn.o_proj is better than none"
    with pytest.raises(ArchitectureError, match=reason):
        fitted(tiny_model("gemma2"), [2], tokens())


def test_a_block_without_a_layer_that_writes_is_refused(monkeypatch):
    monkeypatch.setattr(linear, "gained_writes", lambda *args: [])
    reason = r"block 1 \(attention\+moe\) cannot absorb a patch: none of its linear layers writes"
    with pytest.raises(ArchitectureError, match=reason):
        fitted(tiny_model("mixtral"), [2], tokens())


def test_the_kit_shows_which_layer_absorbs(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- patches -->\nold\n<!-- end of patches -->\nafter\n")
    assert patches.main(["nemotron_h", "qwen3_moe", "gemma4", "--docs", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "patches_absorbed: 6\npatches_none: 0\npatches_not_measured: 1\n" in shown
    rows = {line.split(" | ")[0]: line for line in page.read_text().splitlines()}
    assert (
        "`mixer.out_proj` (mamba2); `mixer.shared_experts.down_proj` (moe)" in rows["| nemotron_h"]
    )
    assert (
        "`mlp.down_proj` (attention+mlp) | `self_attn.o_proj` (attention+moe)"
        in rows["| qwen3_moe"]
    )
    assert "blocks pass more than the residual stream" in rows["| gemma4"]
    assert "old" not in rows
    assert patches.main(["nobody"]) == 2
