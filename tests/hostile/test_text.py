"""Whatever file is given as a text: one line, within bounds, and nothing made."""

import contextlib
import json
import os
import resource
import socket

import pytest
from arena import Row
from sample_texts import GONE, ITEMS, LINES, MEASURE, NUL, SMALL, UTF8, WORDS, packed, written
from transformers import AutoTokenizer

from isingcut.data import text_files
from isingcut.data.calibration import build

pytestmark = pytest.mark.usefixtures("smaller_bounds")

DEEP = b"[" * 100_000 + b"]" * 100_000


def sparse(name, size, begin=b""):
    """A file of NUL bytes that takes no room."""

    def prepare(arena):
        (arena.here / name).write_bytes(begin)
        os.truncate(arena.here / name, size)

    return prepare


def broken(content, at):
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


NO_OBJECT, NO_STRING = "line 1 must be a JSON object, found ", "'text' must be a string, found "
NO_MESSAGES, HALF = "'messages' must be a list of objects", b'{"text": "a \\ud83d b"}\n'
NO_ROLE = b'{"messages": [{"content": "a"}]}\n'
HALF_CHAT = b'{"messages": [{"role": "user", "content": "\\udc00"}]}\n'
TWO_LINES = b'{"text": "a"}\n{"text": \n'
CONTENTS = [
    ("a.txt", "empty", b"", "a.txt is too short: .*found 0;"),
    ("a.txt", "one word", b"word", "a.txt is too short: .*found 0;"),
    ("a.txt", "a mark and no more", b"\xef\xbb\xbf", "a.txt is too short: .*found 0;"),
    ("a.txt", "latin-1", WORDS.encode() + "é".encode("latin-1") + b"!", UTF8.format(0xE9)),
    ("a.txt", "utf-16", WORDS.encode("utf-16"), UTF8.format(0xFF)),
    ("a.txt", "utf-16 unmarked", WORDS.encode("utf-16-le"), NUL),
    ("a.txt", "utf-32", WORDS.encode("utf-32-be"), NUL),
    ("a.txt", "binary", bytes(range(256)), UTF8.format(0x80)),
    ("a.txt", "a picture", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), UTF8.format(0x89)),
    ("a.txt", "packed unnamed", packed(WORDS.encode()), UTF8.format(0x8B)),
    ("a.txt", "cut in a character", b"abc \xe2\x82", UTF8.format(0xE2)),
    ("a.md", "another kind", WORDS.encode(), r"a.md is not one of \.txt, \.jsonl, \.json, \.csv"),
    ("a", "no kind", WORDS.encode(), r"a is not one of \.txt"),
    ("a.jsonl", "empty", b"", "a.jsonl has no records"),
    ("a.jsonl", "blank lines", b"\n \r\n\n", "a.jsonl has no records"),
    ("a.jsonl", "broken", TWO_LINES, r"a\.jsonl line 2 is not valid JSON"),
    ("a.jsonl", "two on a line", b'{"text": "a"}{"text": "b"}', "line 1 is not valid JSON: Extra"),
    ("a.jsonl", "not a number", b'{"text": "a", "x": NaN}\n', "line 1 .*NaN is not JSON"),
    ("a.jsonl", "a name twice", b'{"text": "a", "text": "b"}\n', "the key 'text' appears twice"),
    ("a.jsonl", "a huge number", b'{"text": ' + b"9" * 9999 + b"}\n", "line 1 is not valid JSON"),
    ("a.jsonl", "deep", b'{"text": ' + DEEP + b"}\n", "nested deeper than 200 levels"),
    ("a.jsonl", "a list", b"[1]\n", NO_OBJECT + "list"),
    ("a.jsonl", "null", b"null\n", NO_OBJECT + "NoneType"),
    ("a.jsonl", "other fields", b'{"body": "a"}\n', "neither 'text' nor 'messages' .it has body"),
    ("a.jsonl", "no fields", b"{}\n", "neither 'text' nor 'messages' .it has nothing"),
    ("a.jsonl", "text null", b'{"text": null}\n', NO_STRING + "NoneType"),
    ("a.jsonl", "text a list", b'{"text": ["a"]}\n', NO_STRING + "list"),
    ("a.jsonl", "mixed", b'{"text": "a"}\n{"messages": []}\n', "line 2 has no 'text'"),
    ("a.jsonl", "half a character", HALF, r"'\\ud83d', a lone surrogate"),
    ("a.jsonl", "utf-16", LINES.encode("utf-16"), "line 1 is not UTF-8"),
    ("a.jsonl", "latin-1", b'{"text": "caf\xe9"}\n', "line 1 is not UTF-8"),
    ("a.jsonl", "messages text", b'{"messages": "hello"}\n', NO_MESSAGES),
    ("a.jsonl", "messages none", b'{"messages": []}\n', NO_MESSAGES),
    ("a.jsonl", "messages texts", b'{"messages": ["a"]}\n', NO_MESSAGES),
    ("a.jsonl", "no role", NO_ROLE, "objects with 'role' and 'content'"),
    ("a.jsonl", "half a character in a chat", HALF_CHAT, "line 1 contains .*half of a character"),
    ("a.json", "empty", b"", "a.json is not valid JSON"),
    ("a.json", "no records", b"[]", "a.json has no records"),
    ("a.json", "an object", b'{"text": "a"}', "a.json must be a list .*found dict"),
    ("a.json", "lines", LINES.encode(), "a.json is not valid JSON: Extra data"),
    ("a.json", "numbers", b"[1, 2]", "item 0 must be a text, or an object .*found int"),
    ("a.json", "deep", DEEP, "a.json is not valid JSON: it is nested deeper than 200"),
    ("a.json", "mixed", b'["a", {"body": "b"}]', "item 1 has no 'text'"),
    ("a.json", "cut off", b'["a", "b', "a.json is not valid JSON"),
    ("a.csv", "empty", b"", "must have a column 'text'.* has nothing"),
    ("a.csv", "no text", b"id,body\n1,a\n", "must have a column 'text'.* has id, body"),
    ("a.csv", "text twice", b"text,text\na,b\n", "must have a column 'text', or one column"),
    ("a.csv", "semicolons", b"id;text\n1;a\n", "has id;text .columns are separated by commas"),
    ("a.csv", "a bare comma", b"id,text\n1,a, b\n", "line 2 has 3 fields, but .* has 2 columns"),
    ("a.csv", "an open quote", b'text\n"a\nb\n', "line 3 is not valid CSV: unexpected end of data"),
    ("a.csv", "a stray quote", b'text\n"a"b\n', "line 2 is not valid CSV"),
    ("a.csv", "NUL", b"text\na\0b\n", NUL),
    ("a.csv", "latin-1", b"text\ncaf\xe9!\n", UTF8.format(0xE9)),
    ("a.txt.gz", "cut off", packed(WORDS.encode())[:-30], "a.txt.gz is not a complete gzip file"),
    ("a.txt.gz", "not packed", WORDS.encode(), "a.txt.gz is not a complete gzip file .Not a"),
    ("a.jsonl.gz", "damaged", broken(packed(LINES.encode()), 40), "is not a complete gzip file"),
    ("a.jsonl.gz", "empty", b"", "a.jsonl.gz has no records"),
    ("a.txt.gz", "packed twice", packed(packed(WORDS.encode())), UTF8.format(0x8B)),
    ("a.txt.gz", "a bomb of NULs", packed(bytes(1 << 24)), NUL),
    ("a.txt.gz", "a bomb of marks", packed(b"\xef\xbb\xbf"), "a.txt.gz is too short"),
    ("a.jsonl.gz", "a bomb of one line", packed(b" " * (1 << 24)), "line 1 is longer than 524288"),
    ("a.jsonl.gz", "a bomb of lines", packed(b"\n" * (1 << 24)), "unpacks to more than 2097152"),
    ("a.json.gz", "a bomb", packed(b"[" + b" " * (1 << 24)), "a.json.gz has more than 524288"),
]
HELD = [
    Row(f"{name} {what}", MEASURE + name, line, written(name, content))
    for name, what, content, line in CONTENTS
]
HELD += [
    Row("a line of records beyond the bound", MEASURE + "a.jsonl", "line 1 is longer than",
        sparse("a.jsonl", 1 << 26)),
    Row("a text of nothing", MEASURE + "a.txt", NUL, sparse("a.txt", 1 << 26)),
    Row("a list beyond the bound", MEASURE + "a.json", "a.json has more than 524288 bytes",
        sparse("a.json", 1 << 26, b"[")),
]  # fmt: skip


def link(name, to):
    return lambda arena: (arena.here / name).symlink_to(to)


def bound_socket(arena):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as s:
        s.bind("a.txt")


def folder_of(name, *files):
    def prepare(arena):
        (arena.here / name).mkdir()
        for file in files:
            (arena.here / name / file).write_text("x", encoding="utf-8")

    return prepare


FOLDER = "folder without data files"
LOOP = "cannot (read|resolve) .*a.txt: (Too many levels|Symlink loop)"
# What is typed behind `--calibration`.
PLACES = [
    ("a device", "/dev/zero", "/dev/zero is a device; expected a file or a pipe"),
    ("the null device", "/dev/null", "/dev/null is a device"),
    ("a link to a device", "a.txt", "a.txt is a device", link("a.txt", "/dev/zero")),
    ("a socket", "a.txt", "cannot read .*a.txt: No such device", bound_socket),
    ("a link to nothing", "a.txt", GONE, link("a.txt", "none")),
    ("a link to itself", "a.txt", LOOP, link("a.txt", "a.txt")),
    ("nothing", "none.txt", GONE),
    ("no table", "none.csv", GONE),
    ("nothing packed", "none.jsonl.gz", GONE),
    ("nothing below a file", "text.txt/none.txt", GONE),
    ("nothing at home", "~/none", GONE),
    ("no such user", "~nobody-there/a.txt", "no home folder of that name"),
    ("no name", "''", "--calibration has no records"),
    ("a blank name", "' '", "--calibration has no records"),
    ("a long name", "x" * 300 + ".txt", "cannot read x.*: File name too long"),
    ("an empty folder", "data", "data is a " + FOLDER, folder_of("data")),
    ("a folder of others", "data", FOLDER, folder_of("data", "a.py")),
    ("a folder like a file", "a.txt", FOLDER, folder_of("a.txt", "b.txt")),
    ("a folder like a packed file", "a.csv.gz", FOLDER, folder_of("a.csv.gz", "b.txt")),
    ("a list that is gone", "'2 texts in memory (0123456789abcdef)'", "is not kept; pass it again"),
]
HELD += [Row(name, MEASURE + place, *more) for name, place, *more in PLACES]
GONE_MODEL = "energy 'Llama in memory (0123456789abcdef)' --out new " + SMALL
HELD += [Row("a model that is gone", GONE_MODEL, "is not kept")]


@pytest.mark.parametrize("row", HELD, ids=lambda row: row.name)
def test_texts(arena, row):
    arena.try_row(row)


HEAL = (
    "heal {run}/model --teacher {model} --out new --length 16 --samples 3 --report-samples 3 "
    "--dtype float32 --text "
)
HEALING = [
    Row("heal a device", HEAL + "/dev/zero", "/dev/zero is a device; expected a file or a pipe"),
    Row("heal a table", HEAL + "a.csv", "must have a column 'text'", written("a.csv", b"a,b\n1,2")),
    Row("heal nothing", HEAL + "a.json", "a.json has no records", written("a.json", b"[]")),
]


@pytest.mark.parametrize("row", HEALING, ids=lambda row: row.name)
def test_texts_to_heal_with(arena, row):
    arena.try_row(row)


# Kinds of files give the same tokens -----------------------------------------------------


@pytest.fixture
def tokens_of(arena):
    """The hash of the tokens of a file of that name and content."""
    tokenizer = AutoTokenizer.from_pretrained(arena.model)
    counts = {"samples": 3, "rank_samples": 3, "report_samples": 3, "length": 16, "seed": 0}

    def tokens(name, content):
        (arena.here / name).write_bytes(content)
        return build(name, tokenizer, **counts).sha256

    return tokens


def test_the_same_records_in_any_file_are_the_same_tokens(tokens_of):
    lines = "".join(json.dumps({"text": t}) + "\n" for t in ITEMS).encode()
    table = "text\n" + "".join(f'"{t}"\n' for t in ITEMS)
    wide = "id,text\r\n" + "".join(f'{i},"{t}"\r\n' for i, t in enumerate(ITEMS))
    same = {
        "a.jsonl": lines,
        "b.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"),
        "a.json": json.dumps(ITEMS).encode(),
        "b.json": json.dumps([{"text": t} for t in ITEMS]).encode(),
        "a.csv": table.encode(),
        "b.csv": wide.encode("utf-8-sig"),
        "c.csv": table.replace("text", "anything", 1).encode(),
        "a.jsonl.gz": packed(lines),
        "a.json.gz": packed(json.dumps(ITEMS).encode()),
        "A.CSV.GZ": packed(table.encode()),
    }
    found = {name: tokens_of(name, content) for name, content in same.items()}
    assert len(set(found.values())) == 1, found
    plain = tokens_of("a.txt", WORDS.encode())
    assert plain == tokens_of("a.txt.gz", packed(WORDS.encode()))


# One line of twenty megabytes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"word " * (4 << 20)),
        ("a.txt", b"word" * (5 << 20)),
        ("a.jsonl", b'{"text": "' + b"word " * (4 << 20) + b'"}\n'),
    ],
    ids=["text", "one word", "record"],
)
def test_one_long_line_takes_no_more_memory_than_a_piece(arena, monkeypatch, name, content):
    monkeypatch.setattr(text_files, "RECORD", 64 << 20)
    (arena.here / name).write_bytes(content)
    arena.try_row(Row(name, MEASURE + name, code=0, makes=("new*", "home*"), megabytes=1000))


# The disk --------------------------------------------------------------------------------


def test_a_disk_that_takes_no_more_leaves_no_half_of_the_tokens(arena):
    """The system's own limit on a file's size, which `calibration.safetensors` is beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        command = MEASURE.replace("--samples 3", "--samples 250") + "{text}"
        arena.try_row(
            Row(
                "full", command, "cannot write .*calibration.safetensors: File too", makes=("new*",)
            )
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in (arena.here / "new").iterdir()) == ["run.json"]
