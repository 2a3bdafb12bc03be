"""Steps that make the files of an arena hostile; most functions return such a step."""

import json
import os
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from shared import save_json

ENERGY = "energy {model} --calibration {text} --samples 2 --length 16 --out {here}/new"
CONFIG = "model/config.json"
WEIGHTS = "model/model.safetensors"


def written(place, content="mine"):
    """Put text or bytes into a file."""

    def prepare(arena):
        path = arena.here / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def changed(place, change):
    """Change a file by ``change``, which edits its bytes in place or returns new ones."""

    def prepare(arena):
        path = arena.here / place
        data = bytearray(path.read_bytes())
        new = change(data)
        path.write_bytes(data if new is None else new)

    return prepare


def edited(place, change):
    """Change the content of a JSON file in the same way."""

    def edit(data):
        content = json.loads(data)
        new = change(content)
        # In the format in which isingcut writes JSON.
        return (json.dumps(content if new is None else new, indent=1) + "\n").encode()

    return changed(place, edit)


def config(place=CONFIG, **changes):
    """Set fields of a config.json; None is JSON's null."""
    return edited(place, lambda content: content.update(changes))


def exchange(content):
    """Exchange two letters of a tokenizer."""
    words = content["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]


def other_model(arena):
    """Write another version of the model, `other`."""
    shutil.copytree(arena.model, arena.here / "other")
    config("other/config.json", rms_norm_eps=2e-6)(arena)


def deep(place):
    """Write JSON that is nested too deeply for any reader."""
    return written(place, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


def pipe(place):
    """Replace a file by a pipe without a writer."""

    def prepare(arena):
        (arena.here / place).unlink(missing_ok=True)
        os.mkfifo(arena.here / place)

    return prepare


def linked(place, to):
    """Replace a file by a symbolic link."""

    def prepare(arena):
        (arena.here / place).unlink(missing_ok=True)
        (arena.here / place).symlink_to(arena.here / to)

    return prepare


def removed(*places):
    """Delete files."""
    return lambda arena: [(arena.here / place).unlink() for place in places]


def tensors(edit, place="model"):
    """Change the stored tensors of a checkpoint, a dictionary of NumPy arrays, in place."""

    def prepare(arena):
        path = arena.here / place / "model.safetensors"
        held = load_file(path)
        edit(held)
        save_file(held, path, {"format": "pt"})

    return prepare


def poke(name, value):
    """Return a change to tensors that sets one number of one of them."""

    def edit(held):
        held[name] = held[name].copy()
        held[name].flat[3] = value

    return edit


def number(name, value, place="model"):
    """Set one number of one tensor to ``value``."""
    return tensors(poke(name, value), place)


def header(edit, place=WEIGHTS, length=lambda n: n):
    """Change the header of a safetensors file, a dictionary, and the length stated before it."""

    def change(data):
        end = 8 + int.from_bytes(data[:8], "little")
        content = json.loads(data[8:end])
        new = edit(content)
        said = json.dumps(content if new is None else new).encode()
        return (length(len(said)) % 2**64).to_bytes(8, "little") + said + data[end:]

    return changed(place, change)


def entry(**changes):
    """Change the header's entry of one tensor."""
    return header(lambda content: content["model.norm.weight"].update(changes))


def sharded(edit):
    """Store the weights as one shard with an index, which ``edit`` changes."""

    def prepare(arena):
        names = list(load_file(arena.here / WEIGHTS))
        shard = "model-00001-of-00001.safetensors"
        (arena.here / WEIGHTS).rename(arena.model / shard)
        index = {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(names, shard),
        }
        save_json(arena.model / "model.safetensors.index.json", edit(index))

    return prepare


def both(*steps):
    """Run several steps in order."""

    def prepare(arena):
        for step in steps:
            step(arena)

    return prepare


def overflow(held):
    """Scale weights so that they stay finite but the output of block 2 overflows float32."""
    for name, factor in (("up_proj", 1e10), ("down_proj", 1e38)):
        held[f"model.layers.2.mlp.{name}.weight"] *= factor


def zero(held):
    """Set every weight to 0."""
    for name in held:
        held[name] = 0 * held[name]


def without(held, *parts):
    """Remove the tensors whose names contain one of ``parts``."""
    for name in [n for n in held if any(p in n for p in parts)]:
        del held[name]


def more_blocks(held):
    """Add the tensors of one block more than the config states."""
    for name in [n for n in held if ".layers.5." in n]:
        held[name.replace(".5.", ".6.")] = held[name].copy()


def ones(*shape):
    """Return a float32 array of ones."""
    return np.ones(shape, np.float32)
