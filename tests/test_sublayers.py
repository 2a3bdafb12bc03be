"""Sublayers as blocks: splitting, cutting, streaming, healing and runs with `--units sublayers`."""

import functools

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import load_file

from healings import options, write_text
from isingcut.energies.fisher import Fisher
from isingcut.energies.pairwise import Pairwise
from isingcut.formats.checkpoints import Checkpoint
from isingcut.healing.heal import heal
from isingcut.ising.states import states_of
from isingcut.models.sublayers import check_sublayers, find_removed, split_layers
from shared import (
    OPTIONS,
    ArchitectureError,
    VerificationError,
    cells,
    flags,
    load_json,
    module_fixture,
    parametrize,
    refuses,
    run_tiny,
    save_json,
)
from sweep.gates import gated_loss
from tiny import (
    Work,
    count_calls,
    edit_tensors,
    excise,
    find_stack,
    forbids,
    gate_gradients,
    load,
    load_streamed,
    load_tiny,
    measure,
    plain_means,
    random_tokens,
    replay_of,
    samples,
    some_states,
    tiny_checkpoint,
    tiny_model,
    verify,
    watch,
)

SUBLAYERS = {"dtype": "float32", "device": "cpu", "split": True}


def load_split(folder):
    return load(folder, **SUBLAYERS).model


def cut(folder, removed, out):
    """Write the exact cut of a checkpoint without these sublayers, with its record."""
    model = load_split(folder)
    state = find_removed(Checkpoint.read(folder), model, removed)
    excise(folder, state, out)
    record = {"removed": removed, "layers": state.layers, "of": 12}
    save_json(out / "isingcut.json", record)
    return model


def is_zero(tensors):
    return {name for name, tensor in tensors.items() if not tensor.any()}


def inside(tensors, *modules):
    return {name for name in tensors if any(f".{m}." in name for m in modules)}


KINDS = {
    "llama": ["attention", "mlp"] * 6,
    "gemma2": ["sliding-attention", "mlp", "attention", "mlp"] * 3,
    "mixtral": ["attention", "moe"] * 6,
    "jamba": ["mamba", "mlp", "mamba", "moe", "attention", "mlp", "mamba", "moe"] * 3,
    # Its modules add what they compute to the stream themselves.
    "bloom": ["attention", "mlp"] * 6,
}


@parametrize("family", KINDS)
def test_halves_one_after_the_other_are_the_layer(family, tmp_path):
    folder = tiny_checkpoint(family, tmp_path)
    plain = load_tiny(folder).model
    model = load_split(folder)
    stack = find_stack(model)
    assert list(stack.kinds) == KINDS[family]
    assert stack.split
    assert stack.layers == [i // 2 for i in range(len(stack))]
    assert stack.remove([0, 3, 4, 5]).layers == (2,)
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.state_dict().keys() == plain.state_dict().keys()
    ids = samples().input_ids
    attention = count_calls(next(model.get_submodule(stack.path)[0].children()))
    with torch.no_grad():
        both = [m(input_ids=ids, use_cache=False).logits for m in (model, plain)]
    assert_array_equal(*both)
    assert len(attention) == 2
    both = [
        m.generate(ids[:1], max_new_tokens=5, min_new_tokens=5) for m in (model, plain)
    ]
    assert_array_equal(*both)


UNSPLIT = """
falcon :: parallel attention
cohere2 :: parallel attention
gemma4 :: norm or scale of their sum
zamba2 :: ZambaHybridLayer|Zamba2HybridLayer is not its sublayers
nemotron_h :: the layers of NemotronHForCausalLM have no two sublayers
mamba :: no two sublayers
"""


@parametrize("family, words", cells(UNSPLIT))
def test_layers_that_are_not_two_sublayers_are_refused(family, words, tmp_path):
    folder = tiny_checkpoint(family, tmp_path)
    with refuses(f"{words}.*pass --units blocks$", ArchitectureError):
        load_split(folder)
    with refuses(f"{words}.*pass --units blocks$", ArchitectureError):
        load_streamed(folder, **SUBLAYERS)


def test_a_token_without_an_embedding_hides_no_parallel_attention():
    model = tiny_model("cohere2")
    model.get_input_embeddings().weight.data[0] = 0
    split_layers(model)
    with refuses("parallel attention", ArchitectureError):
        check_sublayers(model)


# The attention of layer 1, the MLP of layer 2, and both of layer 4.
MIXED = [2, 5, 8, 9]


@parametrize("family, attention", {"llama": "self_attn", "gpt2": "attn"}.items())
def test_a_cut_has_zeros_exactly_where_sublayers_are_removed(
    family, attention, tmp_path
):
    folder = tiny_checkpoint(family, tmp_path / "original")
    out = tmp_path / "cut"
    model = cut(folder, MIXED, out)
    before = load_file(folder / "model.safetensors")
    after = load_file(out / "model.safetensors")
    gone = inside(after, f"1.{attention}", "2.mlp")
    assert gone
    assert is_zero(after) == gone
    assert len(inside(after, *"012345")) == len(inside(before, *"01235"))
    for name in after.keys() - gone:
        old = name.replace(".4.", ".5.")
        assert torch.equal(after[name], before[old]), name
    remove = find_stack(model).remove
    assert verify(model, remove(MIXED), out).difference == 0
    for wrong in ([0, 5, 8, 9], [2, 3, 8, 9], [2, 5, 6, 7], [2, 8, 9]):
        with refuses("differs from the original|fails on text", VerificationError):
            verify(model, remove(wrong), out)
    with edit_tensors(out) as tensors:
        for name in gone:
            tensors[name] += torch.linspace(0, 0.1, tensors[name].shape[-1])
    with refuses("differs from the original", VerificationError):
        verify(model, remove(MIXED), out)


@parametrize("family", ["llama", "gemma2", "mixtral", "jamba", "bloom"])
def test_streamed_sublayers_are_those_in_memory(family, tmp_path, one_layout):
    folder = tiny_checkpoint(family, tmp_path)
    whole = load(folder, **SUBLAYERS).replay
    parts = load_streamed(folder, **SUBLAYERS).replay
    tokens = samples()
    states = some_states(len(whole))
    seen = watch(parts)
    found, expected = (
        measure(replay, tokens, states, work=Work(24)) for replay in (parts, whole)
    )
    assert_array_equal(found.kl_sums, expected.kl_sums)
    assert expected.kl_sums.min() > 0
    rows = [
        gate_gradients(r, tokens, gate="block", work=Work(24)) for r in (parts, whole)
    ]
    assert_array_equal(*rows)
    assert max(map(len, seen)) == 2


def test_only_whole_layers_are_illegal():
    model = tiny_model("jamba")
    split_layers(model)
    stack = find_stack(model)
    # Its kinds repeat every four layers, so that no layer goes alone.
    for i in range(0, len(stack), 2):
        assert forbids(model, [i, i + 1])
        assert not forbids(model, [i])
        assert not forbids(model, [i + 1])
    attention = [i for i, kind in enumerate(stack.kinds) if kind == "attention"]
    assert attention == [4, 12, 20]
    assert forbids(model, attention)
    mlps = [i + 1 for i in range(0, 24, 2) if i not in attention]
    assert not forbids(model, [*attention[1:], *mlps])


def test_attention_whose_keys_others_read_stays():
    whole = tiny_model("gemma3n")
    model = tiny_model("gemma3n")
    split_layers(model)
    fixed = [i for i in range(8) if forbids(whole, [i])]
    assert fixed
    assert [i for i in range(8) if forbids(model, [2 * i, 2 * i + 1])] >= fixed
    assert [i for i in range(16) if forbids(model, [i])] == [2 * i for i in fixed]


@module_fixture
def biased(tmp_path_factory):
    """Folder with a model that has biases, and its cut without the attention of the last layer."""
    folder = tmp_path_factory.mktemp("biased")
    tiny_checkpoint("starcoder2", folder / "teacher")
    cut(folder / "teacher", [3, 4, 5, 10], folder / "student")
    write_text(folder / "text.jsonl", 80)
    return folder


@parametrize(
    "method, patch", [("full", "none"), ("lora:2", "none"), ("lora:2", "linear")]
)
def test_healing_keeps_dropped_sublayers_at_zero(biased, method, patch, tmp_path):
    before = load_file(biased / "student" / "model.safetensors")
    gone = is_zero(before)
    assert gone == inside(before, "1.mlp", "4.self_attn")
    assert "model.layers.4.self_attn.o_proj.bias" in gone
    healed = heal(options(biased, tmp_path / "out", method=method, patch=patch))
    after = load_file(healed / "model.safetensors")
    assert is_zero(after) == gone
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert inside(changed, "1.self_attn", "4.mlp", "0.mlp")
    record = load_json(healed / "healing.json")
    assert (record.removed, record.layers, record.of) == ([3, 4, 5, 10], [2], 12)


RUN = {
    **OPTIONS,
    "units": "sublayers",
    "energy": "fisher",
    "patch": "none",
    "random_states": 0,
    "states": 2,
}


def chosen(run):
    return load_json(run / "candidates.json").chosen.removed


@pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning")
def test_a_run_removes_attentions(llama, text, tmp_path, no_speed, typed):
    run = tmp_path / "run"
    given = {**RUN, "model": llama, "calibration": text, "out": run}
    command = ["run", *flags({**given, "remove": "attention=2"})]
    typed(*command)
    removed = chosen(run)
    assert len(removed) == 2
    assert all(i % 2 == 0 for i in removed)
    a, b = (i // 2 for i in removed)
    assert (
        f"the attention of layers {a} and {b} (of 6 layers"
        in (run / "report.md").read_text()
    )
    assert (
        f"the attention of layers {a} and {b}"
        in (run / "model" / "README.md").read_text()
    )
    record = load_json(run / "model" / "isingcut.json")
    assert (record.removed, record.layers, record.of) == (removed, [], 12)
    stored = load_file(run / "model" / "model.safetensors")
    assert is_zero(stored) == inside(stored, f"{a}.self_attn", f"{b}.self_attn")
    files = [
        "hamiltonian.safetensors",
        "candidates.json",
        "evaluation.json",
        "model/config.json",
    ]
    times = {run / name: (run / name).stat().st_mtime_ns for name in files}
    typed(*command)
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_a_streamed_run_chooses_the_same(llama, text, tmp_path, no_speed, one_layout):
    given = {**RUN, "energy": "pairwise", "remove": "3"}
    runs = [
        run_tiny(llama, text, tmp_path / stream, stream=stream, **given)
        for stream in ("on", "off")
    ]
    first, second = (load_json(run / "candidates.json") for run in runs)
    assert first.chosen.removed == second.chosen.removed
    assert first.chosen.kl == second.chosen.kl


def test_inspect_lists_sublayers_whose_costs_sum_to_the_model(llama, answer):
    whole = answer("inspect", llama)
    split = answer("inspect", llama, "--units", "sublayers")
    assert len(split.blocks) == 2 * len(whole.blocks)
    for name in ("bytes", "kv_bytes_per_token"):
        sums = [sum(block[name] for block in found.blocks) for found in (split, whole)]
        assert abs(sums[0] - sums[1]) <= len(split.blocks), name
    assert [b.kv_bytes_per_token > 0 for b in split.blocks] == [True, False] * 6
    norms = 2 * 32
    for i, block in enumerate(whole.blocks):
        parts = split.blocks[2 * i].parameters + split.blocks[2 * i + 1].parameters
        assert parts == block.parameters - norms


def silence(model, removed):
    """Make the attention and MLP modules of a plain llama give zeros."""
    for i in removed:
        layer = model.model.layers[i // 2]
        matrix = layer.mlp.down_proj if i % 2 else layer.self_attn.o_proj
        matrix.weight.data.zero_()
    return model


def test_energies_are_those_of_sublayers_that_give_zeros():
    model = tiny_model("llama")
    split_layers(model)
    check_sublayers(model)
    replay = replay_of(model)
    tokens = random_tokens()
    pairs = Pairwise().measure(replay, tokens, Work())
    for removed in ([0], [5], [2, 7], [8, 9]):
        plain = silence(tiny_model("llama"), removed)
        kl, _ = plain_means(tiny_model("llama"), plain, tokens)
        state = states_of(12, [removed])
        assert_allclose(pairs.energies(state)[0], kl, rtol=1e-4)
    fisher = Fisher().measure(replay, random_tokens([24] * 60), Work())
    ranks = [np.argsort(np.argsort(energy.h)) for energy in (fisher, pairs)]
    assert np.corrcoef(ranks)[0, 1] > 0.8


@parametrize(
    "family, modules", {"llama": ("self_attn", "mlp"), "gpt2": ("attn", "mlp")}.items()
)
def test_gates_of_sublayers_are_those_of_modules(family, modules):
    plain = replay_of(tiny_model(family))
    model = tiny_model(family)
    split_layers(model)
    check_sublayers(model)
    tokens = random_tokens()
    found = gate_gradients(replay_of(model), tokens, work=Work(30))
    assert found.shape == (tokens.samples, 12)
    for half, name in enumerate(modules):
        for s in range(tokens.samples):
            loss = functools.partial(gated_loss, plain, tokens.select([s]), (name,))
            expected = torch.autograd.functional.jacobian(loss, torch.ones(6)).numpy()
            assert_allclose(found[s, half::2], expected, rtol=1e-4, atol=1e-5)
