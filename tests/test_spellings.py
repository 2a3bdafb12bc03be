"""What can be typed for a removal, a budget, blocks, an effort or memory, and what cannot."""

import pytest

from isingcut.errors import InputError
from isingcut.options.spellings import BlockList, Budget, Budgets, Effort, Memory, Removal, Training


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("8", range(8, 9)),
        (" 3 ", range(3, 4)),
        ("4..15", range(4, 16)),
        ("4 .. 15", range(4, 16)),
        ("99999", range(99_999, 100_000)),
        ("attention=2,moe=3", {"attention": 2, "moe": 3}),
        ("attention+mlp=2, moe = 1", {"attention+mlp": 2, "moe": 1}),
        ("sliding-attention+moe=1", {"sliding-attention+moe": 1}),
        ("attention=0,mlp=1", {"attention": 0, "mlp": 1}),
    ],
)  # fmt: skip
def test_removals(text, wanted):
    found = Removal(text)
    assert (found.counts or found.kinds) == wanted
    assert found == text


@pytest.mark.parametrize(
    "text",
    ["two", "attention", "attention=x", "a=1,a=2", "-1", "a=1;b=2", "0", "1 2", "3.5", "4..4",
     "5..3", "0..3", "1..1000000000", "100000", "9" * 5000, "attention=0", "a=1,", "a=100000"],
)  # fmt: skip
def test_what_is_no_removal(text):
    with pytest.raises(InputError):
        Removal(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("params=25%", Budget("params", 0.25, None)),
        ("params=20M", Budget("params", None, 20e6)),
        ("params=2B", Budget("params", None, 2e9)),
        ("bytes=1.5GB", Budget("bytes", None, 1.5e9)),
        ("kv=2KiB", Budget("kv", None, 2048.0)),
        ("latency = 3 ms", Budget("latency", None, 0.003)),
    ],
)
def test_budgets(text, wanted):
    assert Budgets(text).parts == [wanted]


@pytest.mark.parametrize(
    "text",
    ["params", "params=", "params=125%", "params=3xb", "=3", "zorp=5", "params=0", "params=0%",
     "params=0.0K", "params=5ms", "latency=5GB", "params=nan", "params=inf", "params=-3",
     "params=5%,params=6%", "params=5%,", "params=15", "bytes=3", "kv=2",
     "latency=1", "params=" + "9" * 400],
)  # fmt: skip
def test_what_is_no_budget(text):
    with pytest.raises(InputError, match=r"budget|twice"):
        Budgets(text)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (Budgets, "params=15", "write params=15% or params=15M"),
        (Budgets, "bytes=3", "write bytes=3% or bytes=3MB"),
        (Memory, "8", "write 8% or 8GB"),
        (Removal, "20%", "write a share as --budget params=20%"),
    ],
)
def test_a_number_without_its_unit_is_told_how_to_be_written(kind, text, words):
    with pytest.raises(InputError, match=f"{words}$"):
        kind(text)


def test_lists_of_blocks():
    for typed in ("0,1,5-8, 7", "0 1 5 - 8", "[8, 7, 5, 6, 1, 0]", "0\n1\n5-8\n", "(0; 1; 5-8)"):
        assert BlockList(typed).numbers == [0, 1, 5, 6, 7, 8]
    many = ",".join(["0-99999"] * 5000)
    assert len(BlockList(many).numbers) == 100_000
    for text in ("a", "3-1", "1,,x", "-1", "3.5", "none", "0-100000", "0-" + "9" * 5000):
        with pytest.raises(InputError):
            BlockList(text)


@pytest.mark.parametrize(
    ("text", "wanted"), [("8GB", (None, 8e9)), ("512 MiB", (None, 2.0**29)), ("50%", (0.5, None))]
)
def test_memory(text, wanted):
    assert (Memory(text).share, Memory(text).amount) == wanted


@pytest.mark.parametrize("text", ["much", "0GB", "0%", "101%", "8ms", "-8GB", "8 giga bytes"])
def test_what_is_no_memory(text):
    with pytest.raises(InputError, match=r"expected a share .* or an amount|memory "):
        Memory(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", (None, None)),
        ("all", (None, None)),
        ("10min", (None, 600.0)),
        ("1.5 hours", (None, 5400.0)),
        ("2h", (None, 7200.0)),
        ("30m", (None, 1800.0)),
        ("10M tokens", (1e7, None)),
        ("5Mtokens", (5e6, None)),
        ("500 ktok", (5e5, None)),
        ("1 token", (1.0, None)),
    ],
)
def test_healings(text, wanted):
    assert (Training(text).tokens, Training(text).seconds) == wanted


@pytest.mark.parametrize(
    "text",
    ["10", "5M", "0min", "0tokens", "0.5tokens", "10minutess", "-3h", "1e6tokens", "nan h", "h",
     "9999999h", "2000Gtokens", "3 tokens tokens", "9" * 400 + "min"],
)  # fmt: skip
def test_what_is_no_healing(text):
    with pytest.raises(InputError, match="expected a time"):
        Training(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (None, None)),
        ("150", (150.0, None)),
        ("150 passes", (150.0, None)),
        ("20min", (None, 1200.0)),
        ("2h", (None, 7200.0)),
    ],
)
def test_effort_is_read(text, expected):
    assert (Effort(text).passes, Effort(text).seconds) == expected
