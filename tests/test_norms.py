"""Compiled RMS norms against the modules they stand in for, and autograd through those."""

import pytest
import torch

from isingcut.architectures import find_stack, stack_modules
from isingcut.norms import lean_norms
from tiny import tiny_model

# How many a block has: Qwen 3 and Gemma 3 also norm queries and keys.
NORMS = {"llama": 2, "qwen3": 4, "gemma3": 6, "olmo2": 4, "gpt2": 0}


def blocks_of(family: str, dtype: torch.dtype) -> list[torch.nn.Module]:
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            # Fresh weights are all equal, and would not tell the families apart.
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model = model.to(dtype).requires_grad_(False)
    return stack_modules(model, find_stack(model))


def norms_of(block: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in block.modules() if "RMSNorm" in type(m).__name__]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(NORMS))
def test_values_and_gradients_are_those_of_the_modules(family, dtype):
    blocks = blocks_of(family, dtype)
    close = 1e-5 if dtype == torch.float32 else 1e-2
    generator = torch.Generator().manual_seed(6)
    found = norms_of(blocks[1])
    assert len(found) == NORMS[family]
    for module in found:
        # As for queries: four dimensions, seen through a transposition.
        x = 5 * torch.randn(2, 3, 7, len(module.weight), generator=generator)
        x = x.to(dtype).transpose(1, 2).requires_grad_(True)
        toward = torch.randn(x.shape, generator=generator).to(dtype)
        results = []
        for lean in (False, True):
            with lean_norms(blocks if lean else []) as count:
                assert count == lean * NORMS[family] * len(blocks)
                out = module(x)
                results.append((out, *torch.autograd.grad(out, x, toward)))
        for own, compiled in zip(*results, strict=True):
            assert own.shape == compiled.shape
            assert own.dtype == compiled.dtype
            assert (own - compiled).norm() < close * own.norm()
    assert not any("forward" in m.__dict__ for m in found)


def test_modules_that_are_something_else_are_left_alone():
    blocks = blocks_of("llama", torch.float32)
    norm = blocks[0].input_layernorm
    norm.register_forward_hook(lambda module, args, out: 2 * out)
    blocks[1].input_layernorm.weight.requires_grad_(True)

    class RMSNormOfAnotherKind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8), requires_grad=False)
            self.eps = 1e-6

        def forward(self, x):
            return self.weight * x / (1 + x.pow(2).mean(-1, keepdim=True).sqrt())

    with lean_norms([*blocks, RMSNormOfAnotherKind()]) as count:
        assert count == 2 * len(blocks) - 2
