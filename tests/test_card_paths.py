"""Every verb and every option that computes with tensors, on one and on two fake cards.

Each path is a program of isingcut on tiny models. `make cards-sites` prints the share of the call
sites of torch operations that computed on a card, and those that did not (`benchmarks/sites.py`).
"""

import shutil
from functools import partial
from unittest import mock

import pytest
import torch
from gguf import GGMLQuantizationType

import isingcut
from card import short
from cards import fake_cards
from gguf_files import write_packed
from healings import TRAINING, Killed, killing, options, write_student
from isingcut import baselines
from isingcut.energies.search import search
from isingcut.healing.heal import heal
from isingcut.healing.repairs.linear import _Fitting
from isingcut.healing.training import train
from isingcut.measure.gates import GATES, run_gated
from isingcut.models.verify import check_generation
from odd_models import composite
from shared import (
    OPTIONS,
    VerificationError,
    load_json,
    refuses,
    run_tiny,
    works,
    write_jsonl,
)
from sweep.images import invent_images
from sweep.mtp import add_mtp_layers
from test_proof import cut_of
from test_tasks import arc, gsm8k
from tiny import load, random_tokens, tiny_model, verify

pytestmark = pytest.mark.filterwarnings("ignore::isingcut.PoorEnergyWarning")

FEW = {
    **OPTIONS,
    "remove": 2,
    "energy": "fisher",
    "random_states": 0,
    "states": 2,
    "patch": "linear",
    "patch_tokens": 100,
}
"""Options of a run of a second."""
SEARCHED = {"energy": "auto", "effort": "3"}


class Place:
    """The devices and files of one path."""

    def __init__(self, device, out, shared, text):
        self.device = device
        self.out = out
        self.shared = shared
        self.text = text

    def model(self, family="llama", blocks=4, **changes):
        """Return a checkpoint, with few blocks."""
        return self.shared.checkpoint(family, num_hidden_layers=blocks, **changes)

    def run(self, name="run", family="llama", blocks=4, **more):
        """Run and return the folder."""
        more.setdefault("model", self.model(family, blocks))
        given = {**FEW, "device": self.device, **more}
        return run_tiny(text=self.text, out=self.out / name, **given)

    def heal(self, progress=None, **changes):
        """Heal a cut llama."""
        teacher = self.model()
        if not (self.out / "student").exists():
            write_student(teacher, self.out / "student")
        given = {"teacher": teacher, "text": self.text, "samples": 8, "length": 16}
        given |= {"device": self.device, **changes}
        return heal(options(self.out, self.out / "healed", **given), progress=progress)


def default(place):
    """A run with the defaults: searched, near candidates patched, tuned, its speed measured."""
    more = {**SEARCHED, "patch": "tuned", "patch_tokens": 1000, "states": 5}
    place.run(**more, compare_energies="fisher,empirical-fisher")


def verbs(place):
    """The verbs that open a run again, and those that look at a model."""
    run = place.run(patch="none")
    model = place.model()
    for name in baselines.registry.names():
        works("baseline", name, run)
    works("solve", run, "--remove", 1)
    works("rank", run, "--remove", 1)
    works("excise", run, "--blocks", "1,3", "--patch", "linear")
    works("evaluate", run, "--blocks", "1,3")
    plain = ("--device", place.device)
    scores = ("--out", place.out / "scores.json")
    works("evaluate", run / "model", "--original", model, *plain, *scores)
    works("inspect", model, *plain)
    works("plan", model, *plain, "--remove", 2, "--length", 16)


def deep(place, blocks, remove, units="blocks"):
    """A deep cut, with the search among patched states, chooses the blocks of the CPU."""
    model = str(place.model(blocks=blocks))
    more = {**SEARCHED, "patch_tokens": 20_000, "batch_tokens": 512, "remove": remove}
    given = {**FEW, **more, "model": model, "calibration": str(place.text)}
    given["units"] = units

    def prune(device, out):
        isingcut.prune(**given, device=device, out=str(out))

    def chosen(folder):
        return load_json(folder / "candidates.json").chosen.removed

    name = f"deep-{units}-{blocks}"
    expected = place.shared.folder(name, partial(prune, "cpu"))
    prune(place.device, place.out)
    assert chosen(place.out) == chosen(expected)


def streamed(place):
    run = place.run(stream="on", **SEARCHED, compare_energies="empirical-fisher")
    for name in ("block-influence", "angular-window"):
        works("baseline", name, run)


def tasks(place):
    """Likelihoods, answers that are generated, and a text."""
    data = place.out / "data"
    for name, make in (
        ("arc_easy/test", arc),
        ("gsm8k/test", gsm8k),
        ("gsm8k/train", gsm8k),
    ):
        write_jsonl(data / f"{name}.jsonl", [make(i)[1] for i in range(16)])
    model = str(place.model(max_position_embeddings=2048))
    run = place.run(
        model=model,
        choose="tasks",
        patch="none",
        data=str(data),
        tasks="arc_easy",
        questions=12,
    )
    names = ("--tasks", "arc_easy,gsm8k", "--questions", 2, "--data", data)
    with mock.patch("isingcut.evaluation.harness.MOST", 16):
        works("evaluate", run, *names, "--overwrite")


def gguf_file(place):
    return write_packed(place.out / "tiny.gguf", GGMLQuantizationType.Q4_1)


def from_gguf(place):
    works("evaluate", place.run(model=str(gguf_file(place))))


def sublayers(place):
    """Attentions and MLPs as blocks: energy, tuned patch, evaluation, and healing of their cut."""
    more = {"patch": "tuned", "patch_tokens": 200, "heal": "60tokens"}
    place.run(units="sublayers", remove="attention=1,mlp=1", energy="pairwise", **more)


def packed(place):
    file = gguf_file(place)
    size = file.stat().st_size / 1e3
    place.run(model=str(file), remove="", budget=f"file={0.8 * size:.3f}kB")
    place.run(
        "memory", model=str(file), remove="", budget=f"memory={0.8 * size:.3f}kB@16"
    )
    place.run("decode", remove="", budget="decode=40%@16")


def mtp(place):
    folder = place.out / "mtp"
    shutil.copytree(place.shared.checkpoint("deepseek_v3"), folder)
    add_mtp_layers(tiny_model("deepseek_v3"), folder)
    place.run(model=str(folder), patch="linear")


def resumed(place):
    with pytest.raises(Killed):
        place.heal(killing(3))
    place.heal()


def chat(place):
    def talk(i):
        said = {"user": f"say {i}.", "assistant": f"yes {i}."}
        return [{"role": role, "content": words} for role, words in said.items()]

    file = write_jsonl(
        place.out / "chat.jsonl", [{"messages": talk(i)} for i in range(80)]
    )
    place.run(calibration=f"answers:{file}", length=32)


def rows(place):
    """Fits on fewer tokens than a layer has inputs, also of outputs with a bias."""
    few = {"patch_tokens": 100, "must_remove": "2,3"}
    place.run(model=str(place.model(intermediate_size=512)), **few)
    with mock.patch.object(_Fitting, "ways", (False,)):
        place.run("outputs", family="gpt2", **few, patch="tuned")


def slopes(place):
    """A search whose second round exchanges blocks by slope."""
    with mock.patch.object(search, "CHANCE", -1):
        place.run(blocks=6, remove=3, energy="auto", effort="6")


def timed_healing(place):
    """A healing whose budget is a time, which measures its steps first."""
    measure = train.measure_pace

    def measured(*given):
        # So slow that few steps follow.
        return 1 + measure(*given)

    with mock.patch.object(train, "measure_pace", measured):
        few = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
        place.heal(train="10min", trainer=few)


def gates(place):
    """Gates that scale a block by any number, as energies of plug-ins do."""
    replay = load(place.model(), device=place.device.split(",")[0]).replay
    recording = replay.record(random_tokens([12] * 3).input_ids)
    alpha = torch.tensor([0.0, 0.5, 1.0])
    before = recording.entered
    after = recording.block(0, before)
    for gate in GATES:
        found = run_gated(recording, 0, before, alpha, gate)
        torch.testing.assert_close(found[2].cpu(), after[2].cpu())


def images(place):
    """The proof of a model that reads images, and of generation that differs with its cache."""
    model = composite("chameleon")
    cut = cut_of(model, [1], place.out)
    card = place.device.split(",")[0]
    model.to(card)
    assert verify(model, [1], cut, images=invent_images).difference < 1e-5
    model.model.layers[2].self_attn.layer_idx = 0
    with refuses("differs from generation", VerificationError):
        check_generation(
            model, torch.arange(12, device=card)[None] + 20, 8, "the model"
        )


PATHS = {
    # The longest first, so that no processor waits for them. Then the number of cards: two, over
    # which the model is placed, where devices could mix; one, where the model is held whole.
    "deep, 4 of 8": (partial(deep, blocks=8, remove=4), 2),
    "deep, sublayers": (
        partial(deep, blocks=6, remove=5, units="sublayers"),
        2,
    ),
    "range": (partial(Place.run, remove="1..2"), 2),
    "speed": (partial(Place.run, remove="", budget="params=20%,speed=1%@16"), 2),
    "gguf": (from_gguf, 2),
    "heal lora": (partial(Place.heal, method="lora:2", patch="linear"), 2),
    "heal full": (partial(Place.heal, patch="linear"), 2),
    "heal, bfloat16": (
        partial(
            Place.heal,
            dtype="bfloat16",
            trainer={**TRAINING, "gradient_checkpointing": True},
        ),
        1,
    ),
    "heal, resumed": (resumed, 2),
    "heal, timed": (timed_healing, 1),
    "rows": (rows, 2),
    "slopes": (slopes, 1),
    "gates": (gates, 1),
    "images": (images, 1),
    "run": (default, 2),
    "verbs": (verbs, 2),
    "tasks": (tasks, 2),
    "streamed": (streamed, 1),
    "mtp": (mtp, 2),
    "chat": (chat, 1),
    "own text": (partial(Place.run, calibration="self", patch_tokens=64), 2),
    "eager, bfloat16": (
        partial(
            Place.run,
            attention="eager",
            dtype="bfloat16",
            batch_tokens=None,
            patch="tuned",
            patch_tokens=200,
        ),
        2,
    ),
    "budget, packed": (packed, 1),
    "sublayers": (sublayers, 2),
    **{
        f"family {family}": (
            partial(Place.run, family=family, blocks=blocks, must_remove="2,3"),
            count,
        )
        for family, blocks, count in (
            ("gemma2", 4, 2),
            ("qwen3_moe", 6, 1),
            ("gpt2", 4, 1),
            ("bamba", 6, 2),
            ("phi3", 4, 1),
        )
    },
    "search, gemma2": (
        partial(Place.run, family="gemma2", energy="auto", effort="20"),
        1,
    ),
}


@pytest.mark.parametrize("path, count", PATHS.values(), ids=PATHS)
def test_card_path(path, count, shared, text, tmp_path):
    with short(), fake_cards(count) as cards:
        device = ",".join(str(card.device) for card in cards)
        path(Place(device, tmp_path, shared, text))
    # A part of an evaluation that fails costs its own figures only.
    for file in tmp_path.rglob("*.json"):
        assert '"failed"' not in file.read_text()
