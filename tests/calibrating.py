"""Small texts and chats, and helpers, for the tests of calibration."""

from shared import CalibrationError, refuses, write_jsonl
from tiny import TextSampler, build

SIZES = {"samples": 5, "rank_samples": 3, "report_samples": 2}
COUNTS = {"energy": 5, "rank": 3, "report": 2}


def sentences(count):
    return [f"Document {i}: {i * 7919 % 1000} things happened." for i in range(count)]


def write_texts(path, texts):
    """Write a file of documents; return its path."""
    return write_jsonl(path, [{"text": text} for text in texts])


def calibrate(source, tokenizer, length=16, seed=0, model=None, **changes):
    """Build a small calibration."""
    sampler = TextSampler(tokenizer, length, seed, model)
    return build(source, sampler, **{**SIZES, **changes})


def chats(count):
    pairs = ((f"{i}?", "yes " * (i % 3)) for i in range(count))
    roles = ("user", "assistant")
    return [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, p, strict=True)]}
        for p in pairs
    ]


def decoded(tokenizer, tokens):
    pairs = zip(tokens.input_ids, tokens.mask, strict=True)
    return [tokenizer.decode(ids[mask]) for ids, mask in pairs]


def refused(source, tokenizer, words, **changes):
    with refuses(words, CalibrationError) as caught:
        calibrate(source, tokenizer, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message
