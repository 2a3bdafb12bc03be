"""Chat templates and tokenizers of others: one line, within bounds of time and memory."""

import json

import pytest
from arena import Row
from sample_texts import CHATS, MEASURE

pytestmark = pytest.mark.usefixtures("smaller_bounds")

# Chat templates --------------------------------------------------------------------------


def template(text):
    def prepare(arena):
        (arena.model / "chat_template.jinja").write_text(text, encoding="utf-8")
        (arena.here / "a.jsonl").write_text(CHATS, encoding="utf-8")

    return prepare


TEMPLATES = [
    ("calls itself", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
    ("is no template", "{% if %}", "refuses these messages .Expected an expression"),
    ("refuses", "{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("reaches out", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses .*unsafe"),
    ("lacks a field", "{{ messages[0].more.and_more }}", "refuses these messages .*more"),
    ("divides by nothing", "{{ 1 // 0 }}", "refuses these messages .*division"),
    ("writes half a character", "{{ '\\ud800' }}", "contains .*half of a character"),
]


@pytest.mark.parametrize(("what", "program", "line"), TEMPLATES, ids=[t[0] for t in TEMPLATES])
def test_chat_templates(arena, what, program, line):
    arena.try_row(Row(what, MEASURE + "a.jsonl", line, template(program)))


# Tokenizers ------------------------------------------------------------------------------


def tokenizer_file(change):
    def prepare(arena):
        file = arena.model / "tokenizer.json"
        document = json.loads(file.read_text(encoding="utf-8"))
        change(document)
        file.write_text(json.dumps(document), encoding="utf-8")

    return prepare


def panics(document):
    document["pre_tokenizer"] = {"type": "FixedLength", "length": 0}


def knows_no_letter(document):
    document["model"] = {"type": "WordLevel", "vocab": {"<pad>": 0}, "unk_token": "<none>"}


def added(content, number=262):
    def change(document):
        document["added_tokens"].append(
            {
                "id": number,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )

    return change


def special(arena, **tokens):
    file = arena.model / "tokenizer_config.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**document, **tokens}), encoding="utf-8")


def added_as(role, content):
    def prepare(arena):
        tokenizer_file(added(content))(arena)
        special(arena, **{role: content})

    return prepare


BEYOND = r"the token '{}' with id 262, but the model's embedding has only 262 rows"
FAILS = r"the model's tokenizer fails on the text '.*' \({}"


def padding_too_many(arena):
    added_as("pad_token", "<filling>")(arena)
    (arena.here / "a.jsonl").write_text(CHATS, encoding="utf-8")


TOO_MANY, BEGIN = tokenizer_file(added(" ")), added_as("bos_token", "<begin>")
FINE = {"code": 0, "makes": ("new*", "home*")}
TOKENIZERS = [
    Row("panics", MEASURE + "{text}", FAILS.format("chunk size"), tokenizer_file(panics)),
    Row("knows no letter", MEASURE + "{text}", FAILS.format(".*"), tokenizer_file(knows_no_letter)),
    Row("a token too many", MEASURE + "{text}", BEYOND.format(" "), TOO_MANY),
    Row("the same, streamed", MEASURE + "{text} --stream on", BEYOND.format(" "), TOO_MANY),
    Row("a beginning too many", MEASURE + "self", BEYOND.format("<begin>"), BEGIN),
    Row("a padding too many is harmless", MEASURE + "a.jsonl", "", padding_too_many, **FINE),
]


@pytest.mark.parametrize("row", TOKENIZERS, ids=lambda row: row.name)
def test_tokenizers(arena, row):
    arena.try_row(row)
