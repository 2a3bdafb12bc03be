"""Ways to make the files of a tiny model hostile: config, headers, weights, GGUF."""

import json
import os

import numpy as np
from safetensors.numpy import load_file, save_file

ENERGY = "energy {model} --calibration {text} --samples 2 --length 16 --out {here}/new"
WEIGHTS = "model.safetensors"


def config(**changes):
    """Set fields of config.json; None is JSON's null."""

    def prepare(arena):
        path = arena.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return prepare


def written(name, content):
    """Put text or bytes into a file of the model."""

    def prepare(arena):
        path = arena.model / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def deep(name, depth=100_000):
    """JSON nested deeper than any reader can go."""
    return written(name, '{"a":' + "[" * depth + "]" * depth + "}")


def pipe(name):
    """A pipe that nobody writes to, where a file is read."""

    def prepare(arena):
        (arena.model / name).unlink(missing_ok=True)
        os.mkfifo(arena.model / name)

    return prepare


def linked(name, target):
    """A link in a file's place."""

    def prepare(arena):
        (arena.model / name).unlink(missing_ok=True)
        (arena.model / name).symlink_to(target)

    return prepare


def removed(*names):
    """Delete files of the model."""

    def prepare(arena):
        for name in names:
            (arena.model / name).unlink()

    return prepare


def tensors(edit):
    """Change the stored tensors, a dictionary of NumPy arrays, in place."""

    def prepare(arena):
        path = arena.model / WEIGHTS
        held = load_file(path)
        edit(held)
        save_file(held, path, {"format": "pt"})

    return prepare


def number(name, value):
    """One number of one tensor becomes ``value``."""

    def edit(held):
        held[name] = held[name].copy()
        held[name].flat[3] = value

    return tensors(edit)


def header(edit):
    """Change the header of the safetensors file, a dictionary, in place; the rest stays."""

    def prepare(arena):
        path = arena.model / WEIGHTS
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        edit(content)
        said = json.dumps(content).encode()
        path.write_bytes(len(said).to_bytes(8, "little") + said + data[8 + length :])

    return prepare


def entry(**changes):
    """Change the header's entry of one tensor."""
    return header(lambda content: content["model.norm.weight"].update(changes))


def sharded(edit=lambda index: None):
    """The weights as one shard with an index, which ``edit`` may change."""

    def prepare(arena):
        names = list(load_file(arena.model / WEIGHTS))
        shard = "model-00001-of-00001.safetensors"
        (arena.model / WEIGHTS).rename(arena.model / shard)
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
        index = edit(index) or index
        (arena.model / "model.safetensors.index.json").write_text(json.dumps(index))

    return prepare


def both(*steps):
    """Several of these, one after the other."""

    def prepare(arena):
        for step in steps:
            step(arena)

    return prepare


def overflow(held):
    """Finite weights with which the output of block 2 overflows float32."""
    for name, factor in (("up_proj", 1e10), ("down_proj", 1e38)):
        held[f"model.layers.2.mlp.{name}.weight"] *= factor


def zero(held):
    """Every weight is 0."""
    for name in held:
        held[name] = 0 * held[name]


def without(held, *parts):
    """Take the tensors away whose names hold one of ``parts``."""
    for name in [n for n in held if any(p in n for p in parts)]:
        del held[name]


def more_blocks(held):
    """A block more than the config says."""
    for name in [n for n in held if ".layers.5." in n]:
        held[name.replace(".5.", ".6.")] = held[name].copy()


def ones(*shape):
    """A float32 array."""
    return np.ones(shape, np.float32)
