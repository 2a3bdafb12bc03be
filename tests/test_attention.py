"""Causal attention against PyTorch's in float64; in models, against their own."""

import pytest
import torch
import torch.nn.functional as F

from isingcut.errors import ArchitectureError
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.compute import attention
from isingcut.models.compute.attention import NAME, causal_attention, chosen_attention, register
from isingcut.models.replay import Replay
from tiny import tiny_model


def make(family: str) -> Replay:
    model = tiny_model(family).requires_grad_(False)
    return Replay(model, stack_modules(model, find_stack(model)))


def inputs(heads: int, shared: int, dtype: torch.dtype, length: int = 21) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(2, heads, length, 16), (2, shared, length, 16), (2, shared, length, 8)]
    made = [3 * torch.randn(shape, generator=generator) for shape in shapes]
    # As models pass them: a transposed view.
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in made]
    return [x.to(dtype).requires_grad_(True) for x in strided]


@pytest.mark.parametrize(("heads", "shared"), [(6, 6), (6, 2), (4, 1)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2)])
def test_outputs_and_gradients_are_those_of_float64(heads, shared, dtype, close):
    given = inputs(heads, shared, dtype)
    exact = [x.detach().double().requires_grad_(True) for x in given]
    out = causal_attention(*given, 0.3)
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, scale=0.3, enable_gqa=True)
    assert (out - expected).norm() < close * expected.norm()
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = torch.autograd.grad(out, given, toward)
    wanted = torch.autograd.grad(expected, exact, toward.double())
    for g, w in zip(got, wanted, strict=True):
        assert (g - w).norm() < close * w.norm()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "deepseek_v3"])
def test_models_give_the_same_logits(family, monkeypatch):
    calls = []
    monkeypatch.setattr(
        attention,
        "causal_attention",
        lambda *args: calls.append(1) or causal_attention(*args),
    )
    model = tiny_model(family)
    ids = torch.randint(8, 200, (2, 19), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        register()
        model.set_attn_implementation(NAME)
        got = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert calls


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_models_with_sinks_or_a_cap_are_refused(family):
    replay = make(family)
    with (
        pytest.raises(ArchitectureError, match=r"causal.*it computes it as .eager"),
        chosen_attention(replay, NAME),
    ):
        pass
    register()
    replay.model.set_attn_implementation(NAME)
    with torch.no_grad(), pytest.raises(ArchitectureError, match="sinks or a soft cap"):
        replay.model(input_ids=torch.zeros((1, 9), dtype=torch.long), use_cache=False)
