"""Valid and invalid texts for removals, budgets, blocks, efforts and memory."""

from isingcut.options.parsed import (
    BlockList,
    Budget,
    Budgets,
    Effort,
    Memory,
    Removal,
    Training,
)
from shared import RunConfig, parametrize, refuses

# Class, function of its value, and expected results by typed text.
READ = [
    (
        Removal,
        lambda r: r.counts or r.kinds,
        {
            "8": range(8, 9),
            "4..15": range(4, 16),
            "99999": range(99_999, 100_000),
            "attention=2,moe=3": {"attention": 2, "moe": 3},
            "attention+mlp=2, moe = 1": {"attention+mlp": 2, "moe": 1},
            "sliding-attention+moe=1": {"sliding-attention+moe": 1},
        },
    ),
    (
        Budgets,
        lambda b: b.parts[0],
        {
            "file=90MB": Budget("file", None, 90e6),
            "memory=2GB @ 8k": Budget("memory", None, 2e9, 8192),
            "decode=25%@4096": Budget("decode", 0.25, None, 4096),
            "params=25%": Budget("params", 0.25, None),
            "params=20M": Budget("params", None, 20e6),
            "bytes=1.5GB": Budget("bytes", None, 1.5e9),
            "kv=1536B": Budget("kv", None, 1536.0),
            "latency = 3 ms": Budget("latency", None, 0.003),
            "latency=20%@2k": Budget("latency", 0.2, None, 2048),
            "speed=15%@512": Budget("speed", 0.15, None, 512),
        },
    ),
    (
        Memory,
        lambda m: (m.share, m.amount),
        {"8GB": (None, 8e9), "512 MiB": (None, 2.0**29), "50%": (0.5, None)},
    ),
    (
        Training,
        lambda t: (t.tokens, t.seconds),
        {
            "": (None, None),
            "all": (None, None),
            "10min": (None, 600.0),
            "2h": (None, 7200.0),
            "30m": (None, 1800.0),
            "5Mtokens": (5e6, None),
            "1 token": (1.0, None),
        },
    ),
    (
        Effort,
        lambda e: (e.passes, e.seconds),
        {
            "": (None, None),
            "1000000": (1e6, None),
            "20min": (None, 1200.0),
            "2h": (None, 7200.0),
        },
    ),
]


@parametrize("kind, read, texts", READ, ids=[k.__name__ for k, _, _ in READ])
def test_what_is_read(kind, read, texts):
    for text, wanted in texts.items():
        assert read(kind(text)) == wanted, text
        assert kind(text) == text


# Class, expected words, and refused texts; NINES stands for 5,000 of them.
NONE = [
    (Removal, "removal|removes|large|twice|range|share",
     "two | attention | attention=x | a=1,a=2 | -1 | a=1;b=2 | 0 | 3.5 | 4..4 | 0..3 | "
     "1..1000000000 | attention=0 | a=1, | a=100000 | NINES"),
    (Budgets, "budget|twice",
     "params | params= | params=125% | params=3xb | =3 | zorp=5 | params=0% | params=0.0K | "
     "params=5ms | params=nan | params=inf | params=-3 | params=5%,params=6% | params=5%, | "
     "latency=1 | file=0MB | params=NINES"),
    (Budgets, "no unit; known: %, b, k, kb, m, ", "kv=1536 | bytes=3"),
    (Budgets, "no unit; known: %$", "decode=120 | speed=2"),
    (Budgets, "no unit; known: b, k, kb, m, ", "file=142016"),
    (Budgets, "no unit; known: %, k, m, g, b, t$", "params=15"),
    (Memory, "no unit; known: %, b, k, kb, m, ", "16000000000"),
    (Budgets, "unknown unit '%'; known: b, k,", "file=25%"),
    (Budgets, "unknown unit 'GB'; known: %$", "decode=5GB"),
    (Budgets, "a context .*=2GB@8k$", "memory=2GB | memory=2GB@0k | memory=2GB@x"),
    (Budgets, "a GGUF type is chosen for it; omit kv", "file=9MB,kv=5%"),
    (BlockList, "block|large", "a | 3-1 | 1,,x | -1 | 3.5 | 0-100000 | 0-NINES"),
    (Memory, "expected a share .* or an amount|memory ",
     "much | 0GB | 0% | 101% | 8ms | -8GB"),
    (Training, "expected a time",
     "10 | 5M | 0min | 0.5tokens | 10minutess | -3h | 1e6tokens | nan h | h | 9999999h | "
     "2000Gtokens | NINESmin"),
    (BlockList, "cannot read '007' as block numbers", "007"),
    (Removal, "cannot read '\u0663' as a removal", "\u0663"),
    (Removal, "or a share as --budget params=20%$", "20%"),
]  # fmt: skip


@parametrize("kind, words, texts", NONE)
def test_what_is_refused(kind, words, texts):
    for text in texts.split(" | "):
        with refuses(words):
            kind(text.replace("NINES", "9" * 5000))


def test_lists_of_blocks():
    for typed in (
        "0,1,5-8, 7",
        "0 1 5 - 8",
        "[8, 7, 5, 6, 1, 0]",
        "0\n1\n5-8\n",
        "(0; 1; 5-8)",
    ):
        assert BlockList(typed).numbers == [0, 1, 5, 6, 7, 8]
    assert len(BlockList(",".join(["0-99999"] * 5000)).numbers) == 100_000


def test_an_energy_that_is_named_twice_is_measured_once():
    config = RunConfig(
        model="m", energy="pairwise", compare_energies="fisher, pairwise,fisher"
    )
    assert config.energies == ["pairwise", "fisher"]


def test_a_near_name_of_an_option_is_suggested():
    with refuses("'must_remov'; did you mean 'must_remove'"):
        RunConfig(must_remov="3")
