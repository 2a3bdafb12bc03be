"""GGUF files whose bytes and metadata disagree are refused, never converted or cut in part."""

import json
import resource
import struct
import threading
from functools import cache

import damage
import numpy as np
from arena import Row, tried
from damage import both, pipe, poke, without, written
from safetensors.numpy import load_file

from gguf_files import held_by, named, write
from isingcut.files.writing import lock_place
from isingcut.formats import gguf_files
from isingcut.formats.sources import model_identity
from shared import cells, snapshot
from tiny import tiny_model

LIST = 9
WORD = 4
FILE = "m.gguf"
LOOK = "inspect {here}/m.gguf"
CUT = "excise {run} --gguf {here}/m.gguf"
UP = "blk.2.ffn_up.weight"
BAD = "damaged or no GGUF file: "


def file(edit=lambda held: None, **metadata):
    """Return a step that writes the arena's model as ``m.gguf``, after ``edit`` of its tensors."""

    def prepare(arena):
        held = named(load_file(arena.model / "model.safetensors"))
        edit(held)
        write(arena.here / FILE, held, **metadata)

    return prepare


def of_model(seed=0, **changes):
    """Return a step that writes another tiny llama as ``m.gguf``."""
    made = cache(lambda: held_by(tiny_model("llama", seed=seed, **changes)))
    blocks = changes.get("num_hidden_layers", 6)
    return lambda arena: write(arena.here / FILE, made(), blocks=blocks)


def lacking(part):
    """Return `file` without the tensors whose names contain ``part``."""
    return file(lambda held: without(held, part))


def nan(name):
    """Return `file` with one NaN in a tensor."""
    return file(poke(name, np.nan))


def changed(edit):
    """Return a step that writes the whole file with its bytes changed by ``edit``."""
    return both(file(), damage.changed(FILE, edit))


def text(words):
    """Return a string in the encoding of GGUF."""
    return struct.pack("<Q", len(words)) + words.encode()


def pair(key, kind, value):
    """Return one entry of the metadata."""
    return text(key) + struct.pack("<I", kind) + value


def info(shape=(32,)):
    """Return one entry of the tensor list."""
    return text("a") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)


def raw(pairs, infos=()):
    """Return a step that writes a file from metadata entries and tensor entries."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs))
    data = head + b"".join([*pairs, *infos])
    return written(FILE, data + bytes(-len(data) % 32 + 4096))


def ones(held):
    """Double the length of a norm's weight."""
    held["blk.1.ffn_norm.weight"] = held["output_norm.weight"].repeat(2)


def seventh(held):
    """Add a tensor of one block more than the metadata counts."""
    held["blk.6.ffn_up.weight"] = held[UP]


def empty_list(data):
    """Add a key with an empty list, in 32 bytes, so that the data stays aligned."""
    keys = struct.unpack_from("<Q", data, 16)[0] + 1
    more = pair("llama.ab", LIST, struct.pack("<IQ", WORD, 0))
    return data[:16] + struct.pack("<Q", keys) + more + data[24:]


# Errors in the header, which `inspect` (it converts) and `excise --gguf` (it cuts) read alike.
HEADERS = [
    (
        "a block that lacks a tensor",
        lacking(UP),
        f"lacks the tensor {UP}, which block 0 has",
    ),
    ("a block more", file(seventh), "says 6 blocks but has tensors of 7"),
    ("all but one byte", changed(lambda d: d[:-40]), BAD + "it ends early"),
    ("version 9", changed(lambda d: d[:4] + b"\x09" + d[5:]), BAD + ".*version 9"),
    ("a list of exabytes", raw([pair("a", LIST, struct.pack("<IQ", 6, 2**40))]), BAD),
    ("a key twice", raw([pair("a", WORD, bytes(4))] * 2), BAD + ".*Duplicate a"),
    ("a tensor beyond the end", raw([], [info(shape=(2**40,))]), BAD + "it ends early"),
    ("no architecture", raw([], [info()]), "no metadata 'general.architecture'"),
    ("a pipe", pipe(FILE), "m.gguf is a pipe"),
    ("another format", written(FILE, b"PK\x03\x04" + bytes(100)), "no(t a)? GGUF file"),
]
# Errors that only building the model reveals.
CONVERTED = [
    (
        "blocks that all lack a tensor",
        lacking("ffn_up"),
        "lacks 6 tensors .*0.mlp.up_proj.weight",
    ),
    ("no embedding", lacking("token_embd"), "lacks 1 tensors .*embed_tokens"),
    (
        "a tensor of another shape",
        file(ones),
        r"layernorm.weight in .* has the shape \[64\], but",
    ),
    (
        "NaN",
        nan(UP),
        r"model.layers.2.mlp.up_proj.weight in .* has NaN or infinite values",
    ),
]
# Errors that only a comparison with the run's model reveals.
OTHERS = [
    (
        "a file of another model",
        of_model(seed=9),
        "is of another model: .*norm.weight differs",
    ),
    (
        "a deeper model",
        of_model(num_hidden_layers=7),
        "it has 7 blocks, the run's model 6",
    ),
    ("a wider model", of_model(hidden_size=64), "is of another model: "),
    ("an empty list", changed(empty_list), "an empty list as its metadata 'llama.ab'"),
    ("NaN in a norm", nan("output_norm.weight"), "output_norm.weight differs from"),
    HEADERS[0],
]


# What is wrong :: metadata :: expected line, in the same three ways.
METADATA = (
    """
billions of blocks :: {"block_count": 4294967295} :: says 4294967295 blocks but has tensors
blocks in pieces :: {"block_count": 6.0} :: 'llama.block_count' with a whole number
zero blocks :: {"block_count": 0} :: 'llama.block_count' with a whole number above 0
""",
    """
another width :: {"embedding_length": 64} :: has the shape .*, but its model expects .*64
a huge width :: {"embedding_length": 1073741824} :: more than its weights have
no heads :: {"attention.head_count": 0} :: cannot load m.gguf with transformers
an unknown architecture :: {"architecture": "llama9"} :: cannot load m.gguf with transf
""",
    """
another width :: {"embedding_length": 64} :: 64 numbers in its stream, the run's model 32
leading text :: {"leading_dense_block_count": "two"} :: 'llama.leading_dense_block_count', got 'two'
""",
)
for errors, table in zip((HEADERS, CONVERTED, OTHERS), METADATA, strict=True):
    for what, given, line in cells(table):
        errors.append((what, file(**json.loads(given)), line))


def _rows():
    for what, prepare, line in HEADERS:
        yield Row(f"inspect: {what}", LOOK, line, prepare)
    for what, prepare, line in CONVERTED:
        yield Row(
            f"inspect: {what}",
            LOOK,
            line,
            prepare,
            makes=("home/cache", "home/cache/gguf"),
        )
    for what, prepare, line in OTHERS:
        yield Row(f"excise: {what}", CUT, line, prepare)


test_a_hostile_gguf_file_is_refused = tried(list(_rows()))


CACHED = ("home/cache*",)


def test_a_whole_file_is_cut_next_to_the_run(arena):
    made = ("run/model.gguf", "run/run.json")
    arena.works(CUT, *made, prepare=file())
    assert (arena.run / "model.gguf").read_bytes()[:4] == b"GGUF"


def test_a_conversion_clears_what_killed_ones_left(arena):
    left = arena.home / "cache/gguf" / f".{'a' * 64}.isingcut-x.part"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(bytes(1000))
    arena.works(LOOK, *CACHED, line="6 blocks", prepare=file())
    assert not left.exists()


def test_one_converts_and_another_waits_for_it(arena, monkeypatch, spy):
    file()(arena)
    arrived = threading.Event()
    found = []
    converted = spy(gguf_files, "unpack_gguf")
    hashed = gguf_files.file_sha256

    def noted(*arguments):
        if threading.current_thread() is other:
            arrived.set()
        return hashed(*arguments)

    monkeypatch.setattr(gguf_files, "file_sha256", noted)
    other = threading.Thread(
        target=lambda: found.append(gguf_files.convert_file(arena.here / "m.gguf"))
    )
    with lock_place(gguf_files.cache_folder("gguf"), inside=True):
        other.start()
        assert arrived.wait(60)
        mine = gguf_files.convert_file(arena.here / "m.gguf")
    other.join(60)
    assert found == [mine]
    assert model_identity(mine)["gguf_sha256"] == mine.name
    assert len(converted) == 1


def test_a_converted_model_that_was_changed_is_refused(arena):
    arena.works(LOOK, *CACHED, line="6 blocks", prepare=file())
    (config,) = (arena.home / "cache").glob("gguf/*/config.json")
    config.write_text(config.read_text().replace("silu", "gelu"))
    arena.refuses(LOOK, "was changed: config.json in it was changed")


def test_a_cache_that_cannot_be_written_says_how_to_choose_another(arena, monkeypatch):
    monkeypatch.setenv("ISINGCUT_CACHE", str(arena.text / "cache"))
    arena.refuses(LOOK, "cannot be stored .*set ISINGCUT_CACHE", file())


def test_the_cache_is_the_hubs_or_the_named_one(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets")
    )
    monkeypatch.delenv("ISINGCUT_CACHE", raising=False)
    assert gguf_files.cache_folder("gguf") == tmp_path / "assets/isingcut/gguf"
    monkeypatch.setenv("ISINGCUT_CACHE", str(tmp_path))
    assert gguf_files.cache_folder("gguf") == tmp_path / "gguf"


def test_a_full_disk_leaves_no_half_made_model(arena):
    file()(arena)
    before = snapshot(arena.here)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        arena.refuses(LOOK, "cannot be stored .*set ISINGCUT", makes=("home/cache*",))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    made = snapshot(arena.here).keys() - before.keys()
    assert made <= {"home/cache", "home/cache/gguf"}
