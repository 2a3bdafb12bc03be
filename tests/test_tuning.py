"""The micro-batch of a device, the memory of a graph, and the attention of measurements."""

import gc
import weakref

import numpy as np
import torch

from cards import fake_cards
from isingcut.measure.splitting import choose_batch_tokens, count_graph_bytes
from isingcut.measure.streams import one_pass
from shared import ArchitectureError, RunConfig, parametrize, refuses
from tiny import (
    Context,
    Work,
    gate_gradients,
    gate_slopes,
    measure,
    random_tokens,
    replay_of,
    tiny_model,
    tiny_replay,
)


def test_the_micro_batch_of_a_gpu_is_what_fits():
    assert choose_batch_tokens(tiny_replay(), 1 << 40) == 1024
    with fake_cards() as (card,):
        replay = replay_of(tiny_model("llama").to(card.device))
        each = len(replay) * 32 * 4 * replay.model.config.hidden_size
        found = [
            choose_batch_tokens(replay, tokens * each) for tokens in (0, 2500, 1 << 30)
        ]
    assert found == [1024, 2048, 16 * 1024]


def test_a_model_whose_graph_was_measured_is_let_go():
    def measured():
        layer = torch.nn.Linear(4, 8)
        kept = count_graph_bytes(layer, lambda: layer(torch.ones(2, 4)).exp())
        assert kept == 4 * 2 * (4 + 8)
        return weakref.ref(layer.weight)

    gone = measured()
    gc.collect()
    assert gone() is None


@parametrize("family", ["llama", "gemma3"])
def test_measurements_use_the_chosen_attention_and_agree(family):
    replay = tiny_replay(family)
    tokens = random_tokens()
    states = np.eye(len(replay), dtype=bool)
    used = {None: set(), "eager": set()}
    replay.blocks[0].register_forward_pre_hook(
        lambda module, args: used[replay.attention].add(
            replay.model.config._attn_implementation
        )
    )
    found = []
    for replay.attention in used:
        losses = measure(replay, tokens, states).kl_sums
        slopes = gate_slopes(replay, tokens, states[1], 64)
        rows = gate_gradients(replay, tokens)
        found.append([losses, rows, slopes, *one_pass(replay, tokens, Work())])
    assert used == {None: {"sdpa"}, "eager": {"eager"}}
    for i, (plain, other) in enumerate(zip(*found, strict=True)):
        # Slopes and scores of activations gather more rounding.
        rtol, atol = (1e-4, 1e-6) if i < 2 else (1e-3, 1e-5)
        np.testing.assert_allclose(plain, other, rtol=rtol, atol=atol)
    assert replay.model.config._attn_implementation == "sdpa"


@parametrize("stream", ["off", "on"])
def test_a_run_measures_with_the_requested_attention(llama, stream, tmp_path):
    config = RunConfig(model=llama, out=tmp_path / "run", attention="eager")
    context = Context(config.replace(stream=stream, batch_tokens=64).validate())
    used = []
    context.replay.blocks[0].register_forward_pre_hook(
        lambda module, args: used.append(
            context.replay.model.config._attn_implementation
        )
    )
    measure(context.replay, random_tokens(), [])
    assert set(used) == {"eager"}


def test_an_attention_that_is_not_there_is_an_error_in_one_line():
    replay = tiny_replay()
    replay.attention = "no such"
    with refuses("cannot compute attention as 'no such'", ArchitectureError):
        measure(replay, random_tokens(), [])
