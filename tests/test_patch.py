"""The closed-form patch: what it solves, where it is folded, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.errors import ArchitectureError, InputError
from isingcut.healing.patch.files import Patch, apply_patches, runs
from isingcut.healing.patch.linear import Moments, fit_ridge
from isingcut.models.architectures import find_stack, skipped, stack_modules
from isingcut.testing.tiny import tiny_model
from patching import fitted, streams, tokens, watched


def test_runs_are_maximal() -> None:
    assert runs([9, 4, 5, 7, 6, 0]) == [(0, 0), (4, 7), (9, 9)]


def test_ridge_solution_is_that_of_the_augmented_least_squares_problem() -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weights = normal(60, 5), torch.rand(60, generator=generator, dtype=torch.float64) + 0.1
    t = x @ normal(5, 3) + 2.0 * normal(60, 3)
    sides = [Moments(5, 3, torch.device("cpu")) for _ in range(2)]
    for side, rows in zip(sides, (slice(0, 40), slice(40, 60)), strict=True):
        side.add(x[rows], t[rows], weights[rows])
    found = fit_ridge(sides[0], sides[1])
    assert found is not None
    ridge = found.strength * torch.diagonal((x * weights[:, None]).T @ x).mean()
    rows = torch.cat([x * weights.sqrt()[:, None], ridge.sqrt() * torch.eye(5).double()])
    values = torch.cat([t * weights.sqrt()[:, None], torch.zeros(5, 3).double()])
    expected = torch.linalg.lstsq(rows, values).solution.T
    torch.testing.assert_close(found.map, expected)
    assert 0 < found.held_out < 1


def test_useless_features_give_no_map() -> None:
    generator = torch.Generator().manual_seed(2)
    sides = []
    for _ in range(2):
        side = Moments(4, 2, torch.device("cpu"))
        x = torch.randn(8, 4, generator=generator)
        side.add(x, torch.randn(8, 2, generator=generator), torch.ones(8))
        sides.append(side)
    # Opposite targets on the two halves: whatever fits one misleads on the other.
    sides[1].xx, sides[1].tx = sides[0].xx, -sides[0].tx
    assert fit_ridge(sides[0], sides[1]) is None


@pytest.mark.parametrize("reads", [True, False])
def test_one_cut_solves_its_least_squares_problem(reads: bool) -> None:
    model, text, removed = tiny_model("llama"), tokens(), [2, 3]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    (patch,) = fitted(model, removed, text, reads=reads)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (patch.block, patch.path, patch.bias) == (1, "mlp.down_proj", None)
    target = streams(model, text, 3)
    with watched(model, 1, patch.path) as seen, torch.no_grad():
        model(text.input_ids, use_cache=False)
    x, written, out = (seen[k][text.mask] for k in ("read", "written", "stream"))
    weight = model.model.layers[1].mlp.down_proj.weight.double()
    weights = 1 / target.square().mean(-1)
    features = x if reads else written
    root = weights.sqrt()[:, None]
    strength = patch.record.ridge
    assert patch.record.tokens == int(text.mask.sum())
    ridge = strength * torch.diagonal((features * weights[:, None]).T @ features).mean()
    size = features.shape[1]
    rows = torch.cat([features * root, ridge.sqrt() * torch.eye(size).double()])
    values = torch.cat([(target - out) * root, torch.zeros(size, 32).double()])
    change = torch.linalg.lstsq(rows, values, driver="gelsd").solution.T
    expected = weight + (change if reads else change @ weight)
    torch.testing.assert_close(patch.weight, expected, rtol=1e-3, atol=1e-4)


def test_later_cuts_are_fitted_on_the_model_patched_so_far() -> None:
    model, text = tiny_model("llama"), tokens()
    first, second = fitted(model, [1, 4], text)
    stack = find_stack(model)
    blocks = stack_modules(model, stack)
    target = streams(model, text, 4)
    with (
        apply_patches(blocks, [first]),
        skipped(model, stack, [1]),
        watched(model, 3, second.path) as seen,
        torch.no_grad(),
    ):
        model(text.input_ids, use_cache=False)
    x, out = seen["read"][text.mask], seen["stream"][text.mask]
    weights = 1 / target.square().mean(-1)
    change = second.weight - model.model.layers[3].mlp.down_proj.weight.double()
    ridge = second.record.ridge * torch.diagonal((x * weights[:, None]).T @ x).mean()
    left = (target - out - x @ change.T) * weights[:, None]
    # Stationary: the gradient of the objective vanishes at the fitted change.
    torch.testing.assert_close(left.T @ x, ridge * change, rtol=1e-3, atol=1e-3)


def test_a_patch_brings_unseen_text_closer() -> None:
    model, removed = tiny_model("llama"), [2, 4]
    unseen = tokens(4, seed=5)
    patches = fitted(model, removed, tokens(64))
    stack = find_stack(model)
    target = streams(model, unseen, 5)

    def distance(with_patches: Sequence[Patch]) -> float:
        with (
            apply_patches(stack_modules(model, stack), with_patches),
            skipped(model, stack, removed),
            watched(model, 5, "mlp.down_proj") as seen,
            torch.no_grad(),
        ):
            model(unseen.input_ids, use_cache=False)
        return float((seen["stream"][unseen.mask] - target).square().sum())

    assert distance(patches) < 0.9 * distance([])


def test_padding_has_no_say() -> None:
    model, text = tiny_model("llama"), tokens()
    other = TokenSet(text.input_ids.masked_fill(~text.mask, 99), text.mask, text.index)
    (one,), (two,) = (fitted(model, [3], t) for t in (text, other))
    torch.testing.assert_close(one.weight, two.weight)


@pytest.mark.parametrize(
    ("removed", "reason"),
    [
        ([0, 1], "^block 0 is removed"),
        ([0, 2], "^no cut can absorb a patch; block 0: block 0 is .*; block 2: block 1 .* shared"),
    ],
)
def test_a_state_without_a_cut_to_patch_is_refused_with_the_reasons(
    removed: list[int], reason: str
) -> None:
    model: Any = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
        layer.self_attn.o_proj.weight = model.model.layers[0].self_attn.o_proj.weight
    with pytest.raises(ArchitectureError, match=reason):
        fitted(model, removed, tokens())


def test_a_single_sample_is_refused() -> None:
    with pytest.raises(InputError, match="at least two samples"):
        fitted(tiny_model("llama"), [3], tokens(1))
