"""Tiny random models of every family, tiny checkpoints, and what most tests import with them."""

import copy
from contextlib import contextmanager

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from isingcut.data.calibration import Calibration, TextSampler, build
from isingcut.data.tokens import TokenSet
from isingcut.formats.architectures.blocks import find_stack, skip_blocks, stack_modules
from isingcut.formats.architectures.cuts import cut_config, legality
from isingcut.formats.architectures.removed import Removed
from isingcut.formats.cutting import checkpoint
from isingcut.formats.safetensors_files import read_checkpoint
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import states_of
from isingcut.measure.gradients import gate_gradients, gate_slopes
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models import verify as proofs
from isingcut.models.inspect import inspect_model
from isingcut.models.load import load
from isingcut.models.replay import Replay
from isingcut.models.streaming.replay import StreamedReplay, load_streamed
from isingcut.models.streaming.store import Store
from isingcut.models.verify import relative_difference
from isingcut.runs.context import Context
from isingcut.testing.tiny import (
    random_model,
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
)
from shared import load_json, save_json


def gone(blocks):
    """Return a state, also from the blocks of a model whose layers are not split."""
    return blocks if isinstance(blocks, Removed) else Removed(blocks, blocks)


def by_blocks(function):
    """Return a function with a state as its second argument that also takes its blocks."""
    return lambda source, removed, *rest, **options: function(
        source, gone(removed), *rest, **options
    )


excise = by_blocks(checkpoint.excise)
verify = by_blocks(proofs.verify)


def replay_of(model):
    """Freeze the weights of a model and return its replay."""
    model.requires_grad_(False)
    return Replay(model)


def tiny_replay(family="llama", dtype=torch.float32, **changes):
    """Return the replay of a tiny model of a family."""
    return replay_of(tiny_model(family, **changes).to(dtype))


def forbids(model, removed):
    """Return whether a row of legality forbids a state."""
    stack = find_stack(model)
    state = states_of(len(stack), [removed])
    return not all(
        row.satisfied(state)[0] for row in legality(model.config.to_dict(), stack)
    )


@contextmanager
def edit_config(folder):
    """Yield the ``config.json`` of a folder, and write it back afterwards."""
    config = load_json(folder / "config.json")
    yield config
    save_json(folder / "config.json", config)


@contextmanager
def edit_tensors(folder):
    """Yield the tensors of a folder's single file, and write them back afterwards."""
    tensors = load_file(folder / "model.safetensors")
    yield tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def random_tokens(lengths=(14, 9, 14, 11)):
    """Return samples of random tokens."""
    rng = np.random.default_rng(0)
    return TokenSet.from_rows([rng.integers(8, 200, k).tolist() for k in lengths])


def without(model, removed):
    """Return a copy of a model without the removed blocks, for forward passes without a cache."""
    cut = copy.deepcopy(model)
    stack = find_stack(cut)
    blocks = stack_modules(cut)
    kept = [i for i in range(len(stack)) if i not in removed]
    parent, _, name = stack.path.rpartition(".")
    setattr(cut.get_submodule(parent), name, nn.ModuleList(blocks[i] for i in kept))
    for key, value in list(vars(cut.config).items()):
        if isinstance(value, list) and len(value) == len(stack):
            setattr(cut.config, key, [value[i] for i in kept])
    cut.config.num_hidden_layers = len(kept)
    return cut


def count_rows(path):
    """Return the number of rows of a journal."""
    return path.read_bytes().count(b"\n")


def keep_rows(path, rows, *, torn=0):
    """Keep the first rows of a journal, and after them ``torn`` rows without their end."""
    head, *lines = path.read_bytes().split(b"\n")
    cut = [line[:-3] for line in lines[rows : rows + torn]]
    path.write_bytes(b"\n".join([head, *lines[:rows], *cut]))


def plain_sums(first, second, tokens):
    """Return (3, S) float64: NLL of both models and KL of counted tokens, sample by sample."""
    columns = []
    for s in range(tokens.samples):
        ids = tokens.input_ids[s : s + 1, : int(tokens.mask[s].sum())]
        counts = tokens.predicted[s, : ids.shape[1] - 1]
        with torch.no_grad():
            p, q = (
                m(input_ids=ids, use_cache=False)
                .logits[0, :-1]
                .double()
                .log_softmax(-1)
                for m in (first, second)
            )
        nll = [-float(d.gather(1, ids[0, 1:, None])[counts].sum()) for d in (p, q)]
        columns.append([*nll, float((p.exp() * (p - q))[counts].sum())])
    return np.array(columns).T


def plain_means(first, second, tokens):
    """Return KL and NLL of the second model per counted token."""
    _, nll, kl = plain_sums(first, second, tokens).sum(1) / tokens.tokens
    return kl, nll


def count_calls(module):
    """Return a list that gets an entry at each forward pass of a module."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


CPU = torch.device("cpu")


def samples():
    return random_tokens((12, 9, 12))


def some_states(n, count=6):
    return np.random.default_rng(1).random((count, n)) < 0.4


def load_tiny(folder):
    """Load a checkpoint in float32 on the CPU."""
    return load(folder, dtype="float32", device="cpu")


def in_memory(folder):
    return load_tiny(folder).replay


def streamed(folder, device=CPU):
    return StreamedReplay(Store(folder, torch.float32, device))


def watch(replay):
    """Record which parts have weights at each call of a block; check that two buffers hold them."""
    seen = []
    text = replay.text
    head = replay.model.get_output_embeddings()
    outer = {"embed": text.get_input_embeddings(), "head": head}
    modules = {**{str(i): block for i, block in enumerate(replay.blocks)}, **outer}

    def look(module, args):
        real = {
            name: p.untyped_storage().data_ptr()
            for name, m in modules.items()
            for p in m.parameters()
            if not p.is_meta
        }
        seen.append(set(real))
        assert len(set(real.values())) <= 2

    for block in replay.blocks:
        block.register_forward_pre_hook(look)
    return seen
