"""Texts for the hostile rows, and the command that measures on them."""

from __future__ import annotations

import gzip
import json

SMALL = "--length 16 --samples 3 --rank-samples 3 --report-samples 3 --dtype float32"
MEASURE = "energy {model} --out new " + SMALL + " --calibration "
WORDS = "".join(f"Document {i}: {i * 7919 % 1000} things happened. " for i in range(60))
LINES = "".join(json.dumps({"text": f"Document {i} {i * 7919 % 1000}"}) + "\n" for i in range(60))
ITEMS = [f"Document {i}: {i * 7919 % 1000} things happened." for i in range(60)]
CHATS = "".join(
    json.dumps(
        {"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "y"}]}
    )
    + "\n"
    for t in ITEMS
)


def written(name, content):
    return lambda arena: (arena.here / name).write_bytes(content)


def packed(content):
    return gzip.compress(content, mtime=0)


UTF8 = r"is not UTF-8 .invalid byte 0x{:02x}.; save it as UTF-8"
NUL = "contains NUL bytes: it is UTF-16 or not text"


GONE = "the calibration file .* does not exist"
