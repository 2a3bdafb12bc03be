"""Bad texts, chat templates and tokenizers: one line, and no file is made."""

import contextlib
import gzip
import json
import os
import pty
import resource
import socket
import threading

import pytest
from arena import Row, tried
from damage import both, edited, linked, written
from transformers import AutoTokenizer

from calibrating import calibrate, chats, sentences
from isingcut.data import text_files
from shared import cells, parametrize, snapshot

SMALL = "--length 16 --samples 3 --rank-samples 3 --report-samples 3 --dtype float32"
MEASURE = "energy {model} --out new " + SMALL + " --calibration "
WORDS = "".join(f"Document {i}: {i * 7919 % 1000} things happened. " for i in range(60))
LINES = "".join(
    json.dumps({"text": f"Document {i} {i * 7919 % 1000}"}) + "\n" for i in range(60)
)
ITEMS = sentences(60)
CHATS = "".join(json.dumps(chat) + "\n" for chat in chats(60))


def packed(content):
    return gzip.compress(content, mtime=0)


NUL = "contains NUL bytes: it is UTF-16 or not text"


GONE = "the calibration file '.*' does not exist"


pytestmark = pytest.mark.usefixtures("smaller_bounds")

DEEP = b"[" * 100_000 + b"]" * 100_000


# File :: what is wrong :: its content :: expected line.
SHORT = r"""
a.txt :: empty :: :: a.txt is empty; give a longer text
a.jsonl :: empty :: :: a.jsonl has no records
a.jsonl :: broken :: {"text": "a"}\n{"text": \n :: a\.jsonl line 2 is not valid JSON
a.jsonl :: a list :: [1]\n :: line 1 must be a JSON object, found list
a.jsonl :: other fields :: {"body": "a"}\n :: neither 'text' nor 'messages' .it has body
a.jsonl :: text null :: {"text": null}\n :: 'text' must be a string, found NoneType
a.jsonl :: mixed :: {"text": "a"}\n{"messages": []}\n :: line 2 has no 'text'
a.jsonl :: half a character :: {"text": "a \ud83d b"}\n :: not valid JSON
a.jsonl :: messages none :: {"messages": []}\n :: 'messages' must be a list of objects
a.jsonl :: messages texts :: {"messages": ["a"]}\n :: 'messages' must be a list of objects
a.jsonl :: no role :: {"messages": [{"content": "a"}]}\n :: objects with 'role' and 'content'
a.json :: empty :: :: a.json is not valid JSON
a.json :: no records :: [] :: a.json has no records
a.json :: an object :: {"text": "a"} :: a.json must be a list .*found dict
a.json :: mixed :: ["a", {"body": "b"}] :: item 1 has no 'text'
a.csv :: empty :: :: must have a column 'text'.* has nothing
a.csv :: no text :: id,body\n1,a\n :: must have a column 'text'.* has id, body
a.csv :: semicolons :: id;text\n1;a\n :: has id;text .columns are separated by commas
a.csv :: a bare comma :: id,text\n1,a, b\n :: line 2 has 3 fields, but .* has 2 columns
a.csv :: an open quote :: text\n"a\nb\n :: line 3 is not valid CSV: Error: unexpected end of data
"""
CONTENTS = [
    *(
        (*names, text.replace(r"\n", "\n").encode(), line)
        for *names, text, line in cells(SHORT)
    ),
    ("a.txt", "utf-16 unmarked", WORDS.encode("utf-16-le"), NUL),
    (
        "a.md",
        "another kind",
        WORDS.encode(),
        r"a.md is not one of \.txt, \.jsonl, \.json, \.csv",
    ),
    ("a.jsonl", "deep", b'{"text": ' + DEEP + b"}\n", "recursion limit exceeded"),
    (
        "a.txt.gz",
        "not packed",
        WORDS.encode(),
        "a.txt.gz is not a complete gzip file .Not a",
    ),
    (
        "a.jsonl.gz",
        "damaged",
        packed(LINES.encode())[:-9],
        "is not a complete gzip file",
    ),
    ("a.txt.gz", "a bomb of NULs", packed(bytes(1 << 24)), NUL),
    (
        "a.jsonl.gz",
        "a long line",
        packed(b" " * (1 << 24)),
        "line 1 is longer than 524288",
    ),
    ("a.json.gz", "a bomb", packed(b" " * (1 << 24)), "a.json.gz has more than 524288"),
]
HELD = [
    Row(f"{name} {what}", MEASURE + name, line, written(name, content))
    for name, what, content, line in CONTENTS
]


def bound_socket(arena):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as s:
        s.bind("a.txt")


def folder_of(name, *files):
    def prepare(arena):
        (arena.here / name).mkdir()
        for file in files:
            (arena.here / name / file).write_text("x")

    return prepare


# Values of `--calibration`: name, value, expected line, preparation.
PLACES = [
    ("a device", "/dev/zero", "/dev/zero is a device; expected a file or a pipe"),
    ("a socket", "a.txt", "cannot read .*a.txt: No such device", bound_socket),
    (
        "a link to itself",
        "a.txt",
        "a.txt. does not exist|cannot (read|resolve) .*a.txt: (Too many levels|Symlink loop)",
        linked("a.txt", "a.txt"),
    ),
    ("nothing at home", "~/none", GONE),
    ("no such user", "~nobody-there/a.txt", "no home folder of that name"),
    ("a long name", "x" * 300 + ".txt", "cannot read x.*: File name too long"),
    (
        "a folder of others",
        "data",
        "folder without data files",
        folder_of("data", "a.py"),
    ),
]
HELD += [Row(name, MEASURE + place, *more) for name, place, *more in PLACES]
GONE_MODEL = "energy 'Llama in memory (0123456789abcdef)' --out new " + SMALL
HELD += [Row("a model that is gone", GONE_MODEL, "is not kept")]


# Kinds of files give the same tokens -----------------------------------------------------


@pytest.fixture
def tokens_of(arena):
    """Function that returns the hash of the tokens of a file with that name and content."""
    tokenizer = AutoTokenizer.from_pretrained(arena.model)

    def tokens(name, content):
        (arena.here / name).write_bytes(content)
        return calibrate(name, tokenizer).sha256

    return tokens


def test_the_same_records_in_any_file_are_the_same_tokens(tokens_of):
    records = [{"text": t} for t in ITEMS]
    lines = "".join(json.dumps(r) + "\n" for r in records).encode()
    table = "text\n" + "".join(f'"{t}"\n' for t in ITEMS)
    wide = "id,text\r\n" + "".join(f'{i},"{t}"\r\n' for i, t in enumerate(ITEMS))
    same = {
        "a.jsonl": lines,
        "b.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"),
        "a.json": json.dumps(ITEMS).encode(),
        "b.json": json.dumps(records).encode(),
        "a.csv": table.encode(),
        "b.csv": wide.encode("utf-8-sig"),
        "c.csv": table.replace("text", "anything", 1).encode(),
        "a.jsonl.gz": packed(lines),
        "A.CSV.GZ": packed(table.encode()),
    }
    found = {name: tokens_of(name, content) for name, content in same.items()}
    assert len(set(found.values())) == 1, found
    plain = tokens_of("a.txt", WORDS.encode())
    assert plain == tokens_of("b.txt", WORDS.encode("utf-8-sig"))
    assert plain == tokens_of("a.txt.gz", packed(WORDS.encode()))


# One line of twenty megabytes ------------------------------------------------------------


@parametrize(
    "name, content",
    [
        ("a.txt", b"word " * (4 << 20)),
        ("a.txt", b"word" * (5 << 20)),
        ("a.jsonl", b'{"text": "' + b"word " * (4 << 20) + b'"}\n'),
    ],
    ids=["text", "one word", "record"],
)
def test_one_long_line_takes_no_more_memory_than_a_piece(
    arena, monkeypatch, name, content
):
    monkeypatch.setattr(text_files, "RECORD", 64 << 20)
    (arena.here / name).write_bytes(content)
    arena.works(MEASURE + name, "new*", "home*", megabytes=1000)


# The disk --------------------------------------------------------------------------------


def test_a_disk_that_takes_no_more_leaves_no_half_of_the_tokens(arena):
    """The file size limit of the system is set below the size of `calibration.safetensors`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        command = MEASURE.replace("--samples 3", "--samples 250") + "{text}"
        arena.refuses(
            command, "cannot write .*calibration.safetensors: File too", makes=("new*",)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in (arena.here / "new").iterdir()) == ["run.json"]


@contextlib.contextmanager
def standard_input(descriptor):
    """Make a descriptor the standard input of this process, as a shell does."""
    kept = os.dup(0)
    os.dup2(descriptor, 0)
    try:
        yield
    finally:
        os.dup2(kept, 0)
        os.close(kept)


@contextlib.contextmanager
def pipe_of(content, *, again=False):
    """Yield the reading end of a pipe; a thread writes ``content`` into it, once or repeatedly."""
    reading, writing = os.pipe()

    def write():
        with (
            contextlib.suppress(BrokenPipeError),
            os.fdopen(writing, "wb", buffering=0) as f,
        ):
            f.write(content)
            while again:
                f.write(content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield reading
    finally:
        os.close(reading)
        writer.join()


STREAMED = [
    ("nothing", b"", {}, "standard input is too short: it gives 0"),
    ("endless blanks", b" " * 65536, {"again": True}, None),
    (
        "an endless record",
        b'{"text": [' * 4096,
        {"again": True},
        "line 1 is longer than 524288",
    ),
    ("endless NULs", bytes(65536), {"again": True}, NUL),
    (
        "bytes",
        b"\xff\xfe\xfd\xfc",
        {"again": True},
        rf"is not UTF-8 .invalid byte 0x{0xFF:02x}.; save it as UTF-8",
    ),
    ("a marked text", b"\xef\xbb\xbf" + WORDS.encode(), {}, None),
]


@parametrize("what, content, how, line", STREAMED, ids=[s[0] for s in STREAMED])
def test_standard_input(arena, what, content, how, line):
    with pipe_of(content, **how) as end, standard_input(end):
        makes = () if line else ("new*", "home*")
        arena.try_row(
            Row(what, MEASURE + "-", line or "", code=2 * bool(line), makes=makes)
        )


def test_a_terminal_is_not_waited_for(arena):
    mine, its = pty.openpty()
    with standard_input(its):
        arena.refuses(MEASURE + "-", "standard input is a terminal; pipe a text")
    os.close(mine)
    os.close(its)


def test_standard_input_may_be_a_file_but_no_device(arena):
    with (arena.here / "text.txt").open("rb") as file, standard_input(file.fileno()):
        arena.works(MEASURE + "-", "new*", "home*")
    with open("/dev/null", "rb") as file, standard_input(file.fileno()):
        command = MEASURE.replace("new", "other") + "-"
        arena.refuses(command, "standard input is a device")


@parametrize("content", [WORDS.encode(), LINES.encode(), packed(WORDS.encode())])
def test_a_pipe_as_the_shell_makes_it_is_read_once(arena, content):
    """`<(...)`: a resumed run has its tokens and does not need the pipe again."""
    with pipe_of(content) as end:
        command = MEASURE + f"/dev/fd/{end}"
        arena.works(command, "new*", "home*")
        before = snapshot(arena.here / "new")["calibration.safetensors"]
        arena.works(command, "new*", "home*")
        assert snapshot(arena.here / "new")["calibration.safetensors"] == before
    arena.works("solve new --remove 2", "new*", "home*")
    gone = GONE.replace(".*", f"/dev/fd/{end}")
    arena.refuses(command.replace("new", "other"), gone)


def test_a_pipe_cannot_be_healed_with(arena):
    with pipe_of(WORDS.encode()) as end, standard_input(end):
        command = MEASURE.replace("energy", "run --remove 2 --heal") + "-"
        arena.refuses(command, "- is a pipe and can be read only once; save it to")


def test_a_named_pipe_is_waited_for(arena):
    os.mkfifo(arena.here / "a.jsonl")

    def write():
        (arena.here / "a.jsonl").write_text(LINES)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    arena.works(MEASURE + "a.jsonl", "new*", "home*")
    writer.join()


# Chat templates --------------------------------------------------------------------------


def template(text):
    return both(written("model/chat_template.jinja", text), written("a.jsonl", CHATS))


TEMPLATES = r"""
calls itself :: {% macro f() %}{{ f() }}{% endmacro %}{{ f() }} :: maximum recursion depth
is no template :: {% if %} :: refuses these messages .TemplateSyntaxError: Expected an expression
reaches out :: {{ ''.__class__.__mro__[1].__subclasses__() }} :: refuses .*unsafe
writes half a character :: {{ '\ud800' }} :: contains .*half of a character
"""


HELD += [
    Row(n, MEASURE + "a.jsonl", line, template(text))
    for n, text, line in cells(TEMPLATES)
]

# Tokenizers ------------------------------------------------------------------------------


def tokenizer_file(change):
    return edited("model/tokenizer.json", change)


def panics(document):
    document["pre_tokenizer"] = {"type": "FixedLength", "length": 0}


def knows_no_letter(document):
    document["model"] = {
        "type": "WordLevel",
        "vocab": {"<pad>": 0},
        "unk_token": "<none>",
    }


def added(content):
    def change(document):
        (*_, last) = document["added_tokens"]
        document["added_tokens"].append({**last, "id": 262, "content": content})

    return change


def added_as(role, content):
    named = edited(
        "model/tokenizer_config.json", lambda document: {**document, role: content}
    )
    return both(tokenizer_file(added(content)), named)


BEYOND = r"the token '{}' with id 262, but the model's embedding has only 262 rows"
FAILS = r"the model's tokenizer fails on the text '.*' \({}"


FINE = {"code": 0, "makes": ("new*", "home*")}
HELD += [
    Row(
        "panics",
        MEASURE + "{text}",
        FAILS.format("PanicException: chunk size"),
        tokenizer_file(panics),
    ),
    Row(
        "knows no letter",
        MEASURE + "{text}",
        FAILS.format(".*"),
        tokenizer_file(knows_no_letter),
    ),
    Row(
        "a token too many",
        MEASURE + "{text} --stream on",
        BEYOND.format(" "),
        tokenizer_file(added(" ")),
    ),
    Row(
        "a beginning too many",
        MEASURE + "self",
        BEYOND.format("<begin>"),
        added_as("bos_token", "<begin>"),
    ),
    Row(
        "a padding too many is harmless",
        MEASURE + "a.jsonl",
        "",
        both(added_as("pad_token", "<filling>"), written("a.jsonl", CHATS)),
        **FINE,
    ),
]


test_texts = tried(HELD)
