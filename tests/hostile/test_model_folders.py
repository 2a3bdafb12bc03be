"""Model folders with foreign or damaged config, index, headers, weights and tokenizer."""

import json

import numpy as np
from arena import Row, tried
from damage import (
    CONFIG,
    ENERGY,
    WEIGHTS,
    both,
    config,
    deep,
    entry,
    linked,
    more_blocks,
    number,
    ones,
    overflow,
    pipe,
    removed,
    sharded,
    tensors,
    without,
    written,
    zero,
)

from shared import cells

LOOK = "inspect {model}"
UP = "model.layers.2.mlp.up_proj.weight"
TOKENIZER = "model/tokenizer.json"

# Found by `inspect`, with which every run begins: name, changed fields, expected line.
CONFIGS = r"""
a depth in words :: {"num_hidden_layers": "six"} :: a valid llama configuration: .*expected int
100000 blocks :: {"num_hidden_layers": 100000} :: 100000 blocks, but .* tensors of 6
no block :: {"num_hidden_layers": 0} :: says num_hidden_layers=0; expected at least 1
a billion blocks :: {"num_hidden_layers": 1000000000} :: 1000000000; expected at most 100000
another width :: {"hidden_size": 64} :: shape \[.*32\], but its model expects \[.*64\]
a huge width :: {"hidden_size": 10000000} :: more than .* more than its weights have
an unknown activation :: {"hidden_act": "swishish"} :: cannot load the model in .*'swishish'
an unknown model type :: {"model_type": "lama"} :: has model type `lama` but Transformers
a list of model types :: {"model_type": ["llama"]} :: =\['llama'\]; expected a text
an encoder-decoder :: {"model_type": "t5"} :: no text-generating decoder of .* type 't5'
quantised in a word :: {"quantization_config": "fp8"} :: config='fp8'; expected an object
"""
# Fields that the model's class ignores, but a cut would use.
UNREAD = r"""
mlp layers in a number :: {"mlp_only_layers": 3} :: 'mlp_only_layers' has an unknown form
shared layers alone :: {"num_kv_shared_layers": 2} :: no list 'layer_types'
a period of 0 :: {"attn_layer_period": 0} :: 'attn_layer_period' has an unknown form
a list per block of words :: {"moe_layer_freq": {}} :: moe_layer_freq has 0 entries for 6
blocks by name :: {"layer_overrides": {"first": 1}} :: 'layer_overrides' has an unknown form
no block type :: {"block_types": []} :: 'block_types' has an unknown form
a place beyond the blocks :: {"ple_layer_ids": [1, 200]} :: 'ple_layer_ids' has an unknown
a place before the blocks :: {"ple_layer_ids": [0, 1]} :: 'ple_layer_ids' has an unknown form
images nowhere :: {"deepstack_layer_map": [[]]} :: 'deepstack_layer_map' has an unknown form
"""
DEEP = "recursion limit exceeded"
DAMAGED = "is damaged, truncated or not a safetensors file"
OWN = {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}
FILES = [
    (
        "code of its own",
        config(model_type="mine", auto_map=OWN),
        "it needs its own Python code; .* pass --trust-remote-code",
    ),
    ("a deep config", deep(CONFIG), DEEP),
    (
        "a deep generation config",
        deep("model/generation_config.json"),
        "recursion depth",
    ),
    ("a config that is a list", written(CONFIG, "[]"), "is not a JSON object"),
    ("a pipe for weights", pipe(WEIGHTS), "model.safetensors is a pipe"),
    ("a dangling config", linked(CONFIG, "nowhere"), "missing or a broken link"),
    ("a dangling weight file", linked(WEIGHTS, "nowhere"), "is a broken link"),
    (
        "weights of another folder",
        linked(WEIGHTS, "/etc/passwd"),
        "outside the checkpoint",
    ),
    (
        "an adapter",
        both(written("model/adapter_config.json", "{}"), removed(CONFIG)),
        r"PEFT adapter.*from_pretrained\(BASE\).*merge_and_unload",
    ),
    (
        "an adapter beside a model",
        written("model/adapter_config.json", "{}"),
        "PEFT adapter",
    ),
    ("an index that is a list", sharded(lambda i: [1]), "has no 'weight_map'"),
    (
        "an index that leaves",
        sharded(lambda i: {"weight_map": {UP: "../text.txt"}}),
        "leaves the",
    ),
    (
        "an index with more",
        sharded(
            lambda i: {"weight_map": {"more": next(iter(i["weight_map"].values()))}}
        ),
        "says that tensor 'more' is in",
    ),
    (
        "a noisy header",
        written(WEIGHTS, (64).to_bytes(8, "little") + b"x" * 99),
        DAMAGED,
    ),
    ("offsets elsewhere", entry(data_offsets=[10**9, 10**9 + 128]), DAMAGED),
    (
        "a block more",
        tensors(more_blocks),
        "says 6 blocks, but the checkpoint has tensors of 7",
    ),
    (
        "a hole in the blocks",
        tensors(lambda t: without(t, "layers.3.")),
        "none of block 3",
    ),
]
# Damage found by `energy`; `inspect` reads no values and not the name of every tensor.
LOADED = [
    ("no weights", removed(WEIGHTS), "has no weights"),
    ("NaN", number(UP, np.nan), f"{UP} .* has NaN or infinite values"),
    (
        "infinity",
        number("model.norm.weight", -np.inf),
        "norm.weight .* has NaN or infinite values",
    ),
    ("a missing tensor", tensors(lambda t: without(t, UP)), f"lacks 1 tensors .* {UP}"),
    (
        "another shape",
        tensors(lambda t: t.update({UP: ones(40, 32)})),
        rf"{UP} in .* has the shape \[40, 32\], but its model expects \[48, 32\]",
    ),
    (
        "a block fewer",
        tensors(lambda t: without(t, ".5.")),
        "6 blocks, but .* has tensors of 5",
    ),
    (
        "no tokenizer",
        removed(TOKENIZER, "model/tokenizer_config.json"),
        "has no tokenizer",
    ),
    ("a noisy tokenizer", written(TOKENIZER, b"\x00\xff" * 99), "load the tokenizer"),
    ("a deep tokenizer", deep(TOKENIZER), "cannot load the tokenizer"),
]
NAMES = r"""
a dangling model :: inspect {here}/dangling :: is a broken link
a device as a model :: inspect /dev/zero :: is a device; expected a regular file
a model that is a text :: inspect {text} :: is not a model
a folder without a model :: inspect {home} :: has no config.json
a dangling teacher :: heal {model} --teacher {here}/dangling --out {here}/new :: a broken link
"""


ENERGIES = ("pairwise", "refined", "empirical-fisher", "fisher")
OVERFLOW = (
    r"the output of block 2 \(LlamaDecoderLayer\) of .*model is NaN or infinite on the text that "
    "begins '.*'; the weights are damaged or too large"
)


def misnumbered(held):
    """Add tensors with block numbers that are not decimal, or too long for Python."""
    held |= {f"model.layers.{number}.x": held[UP] for number in ("²", "9" * 5000)}


def _rows():
    for energy in ENERGIES:
        for stream in ("off", "on"):
            words = f"--remove 2 --energy {energy} --stream {stream}"
            yield Row(
                f"overflow: {words}",
                f"{ENERGY} {words}",
                OVERFLOW,
                tensors(overflow),
                # The tokens of the text are kept.
                makes=("new", "new/*"),
            )
    yield Row(
        "refined: all weights 0",
        f"{ENERGY} --remove 2 --energy refined",
        "",
        tensors(zero),
        code=0,
        makes=("new", "new/*"),
    )
    yield Row(
        "a text by a model whose block overflows",
        ENERGY.replace("{text}", "self"),
        "the logits of .*model are NaN or infinite at token 1 of a generated text",
        tensors(overflow),
    )
    yield Row(
        "one block",
        ENERGY + " --remove 1",
        "this model has a single block, which must stay; use a deeper model",
        both(
            config(num_hidden_layers=1),
            tensors(lambda t: without(t, *(f".{i}." for i in range(1, 6)))),
        ),
    )
    for what, fields, line in cells(CONFIGS):
        yield Row(f"inspect: {what}", LOOK, line, config(**json.loads(fields)))
    for what, prepare, line in FILES:
        yield Row(f"inspect: {what}", LOOK, line, prepare)
    yield Row(
        "inspect: names that are no block's", LOOK, "", tensors(misnumbered), code=0
    )
    for what, fields, line in cells(UNREAD):
        yield Row(f"energy: {what}", ENERGY, line, config(**json.loads(fields)))
    for what, prepare, line in LOADED:
        yield Row(f"energy: {what}", ENERGY, line, prepare)
        yield Row(f"streamed: {what}", f"{ENERGY} --stream on", line, prepare)
    yield Row("a name too long", f"inspect ./{'x' * 5000}", "there is no model at")
    for what, command, line in cells(NAMES):
        yield Row(what, command, line, linked("dangling", "no"))


test_a_models_folder_is_read_within_bounds = tried(list(_rows()))


def test_inspect_needs_no_tokenizer(arena):
    arena.works(LOOK, line="6 blocks", prepare=removed(TOKENIZER))
