"""Valid and invalid texts for removals, budgets, blocks, efforts and memory."""

from dataclasses import astuple

import yaml

from isingcut.options import parsed
from isingcut.options.parsed import BlockList
from shared import RunConfig, cells, parametrize, refuses

# Class :: typed text :: its value.
READ = """
Removal :: 8 :: [8]
Removal :: 4..7 :: [4, 5, 6, 7]
Removal :: 99999 :: [99999]
Removal :: attention=2,moe=3 :: {attention: 2, moe: 3}
Removal :: attention+mlp=2, moe = 1 :: {attention+mlp: 2, moe: 1}
Removal :: sliding-attention+moe=1 :: {sliding-attention+moe: 1}
Budgets :: file=90MB :: [file, null, 90000000.0, 0]
Budgets :: memory=2GB @ 8k :: [memory, null, 2000000000.0, 8192]
Budgets :: decode=25%@4096 :: [decode, 0.25, null, 4096]
Budgets :: params=25% :: [params, 0.25, null, 0]
Budgets :: params=20M :: [params, null, 20000000.0, 0]
Budgets :: bytes=1.5GB :: [bytes, null, 1500000000.0, 0]
Budgets :: kv=1536B :: [kv, null, 1536.0, 0]
Budgets :: latency = 3 ms :: [latency, null, 0.003, 0]
Budgets :: latency=20%@2k :: [latency, 0.2, null, 2048]
Budgets :: speed=15%@512 :: [speed, 0.15, null, 512]
Memory :: 8GB :: [null, 8000000000.0]
Memory :: 512 MiB :: [null, 536870912.0]
Memory :: 50% :: [0.5, null]
Training :: :: [null, null]
Training :: all :: [null, null]
Training :: 10min :: [null, 600.0]
Training :: 2h :: [null, 7200.0]
Training :: 30m :: [null, 1800.0]
Training :: 5Mtokens :: [5000000.0, null]
Training :: 1 token :: [1.0, null]
Effort :: :: [null, null]
Effort :: 1000000 :: [1000000.0, null]
Effort :: 20min :: [null, 1200.0]
Effort :: 2h :: [null, 7200.0]
"""
VALUES = {
    "Removal": lambda r: r.kinds or [*r.counts],
    "Budgets": lambda b: [*astuple(b.parts[0])],
    "Memory": lambda m: [m.share, m.amount],
    "Training": lambda t: [t.tokens, t.seconds],
    "Effort": lambda e: [e.passes, e.seconds],
}


@parametrize("kind, text, wanted", cells(READ))
def test_what_is_read(kind, text, wanted):
    found = getattr(parsed, kind)(text)
    assert VALUES[kind](found) == yaml.safe_load(wanted)
    assert found == text


# Class :: expected words :: refused texts; NINES stands for 5,000 of them.
NONE = """
Removal :: removal|removes :: two | attention | attention=x | -1 | a=1;b=2 | 0 | 3.5 | a=1, | 0..3
Removal :: large|twice|range :: a=1,a=2 | 4..4 | 1..1000000000 | a=100000 | NINES
Removal :: removal|removes|large|twice|range|share :: attention=0
Removal :: cannot read '٣' as a removal :: ٣
Removal :: or a share as --budget params=20%$ :: 20%
Budgets :: budget|twice :: params | params= | params=125% | params=3xb | =3 | zorp=5 | params=0%
Budgets :: budget|twice :: params=5ms | params=nan | params=inf | params=-3 | params=5%,params=6%
Budgets :: budget|twice :: params=0.0K | params=5%, | latency=1 | file=0MB | params=NINES
Budgets :: no unit; known: %, b, k, kb, m, :: kv=1536 | bytes=3
Budgets :: no unit; known: %$ :: decode=120 | speed=2
Budgets :: no unit; known: b, k, kb, m, :: file=142016
Budgets :: no unit; known: %, k, m, g, b, t$ :: params=15
Budgets :: unknown unit '%'; known: b, k, :: file=25%
Budgets :: unknown unit 'GB'; known: %$ :: decode=5GB
Budgets :: a context .*=2GB@8k$ :: memory=2GB | memory=2GB@0k | memory=2GB@x
Budgets :: a GGUF type is chosen for it; omit kv :: file=9MB,kv=5%
BlockList :: block|large :: a | 3-1 | 1,,x | -1 | 3.5 | 0-100000 | 0-NINES
BlockList :: cannot read '007' as block numbers :: 007
Memory :: no unit; known: %, b, k, kb, m, :: 16000000000
Memory :: expected a share .* or an amount|memory :: much | 0GB | 0% | 101% | 8ms | -8GB
Training :: expected a time :: 10 | 5M | 0min | 0.5tokens | 10minutess | -3h | 1e6tokens | nan h
Training :: expected a time :: h | 9999999h | 2000Gtokens | NINESmin
"""


@parametrize("kind, words, texts", cells(NONE))
def test_what_is_refused(kind, words, texts):
    for text in texts.split(" | "):
        with refuses(words):
            getattr(parsed, kind)(text.replace("NINES", "9" * 5000))


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
