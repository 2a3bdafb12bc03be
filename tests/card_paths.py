"""Every verb and every option that computes with tensors, on one and on two fake cards.

    make cards

Each path is a program of isingcut on tiny models. The command prints the number of paths that
failed, the share of the call sites of torch operations (`benchmarks/sites.py`) that computed on a
card, and those that did not.
"""

import functools
import json
import shutil
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
from isingcut.energies import registry as energy_parts
from isingcut.healing.heal import heal
from isingcut.healing.repairs.linear import _Fitting
from isingcut.healing.training import train
from isingcut.measure.gates import GATES, run_gated
from isingcut.models.verify import check_generation
from odd_models import composite
from shared import OPTIONS, VerificationError, call, refuses, run_tiny, write_jsonl
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

    def run(self, name="run", family="llama", **more):
        """Run and return the folder."""
        model = more.pop("model", None) or self.shared.checkpoint(family)
        given = {**FEW, "device": self.device, **more}
        return run_tiny(model, self.text, self.out / name, **given)

    def type(self, *words):
        """Type a command, which must succeed."""
        assert call(*words) == 0, words

    def heal(self, progress=None, **changes):
        """Heal a cut llama."""
        teacher = self.shared.checkpoint()
        if not (self.out / "student").exists():
            write_student(teacher, self.out / "student")
        given = {"teacher": teacher, "text": self.text, "samples": 8, "length": 16}
        given |= {"device": self.device, **changes}
        return heal(options(self.out, self.out / "healed", **given), progress=progress)


def default(place):
    """A run with the defaults: searched, near candidates patched, tuned, its speed measured."""
    more = {**SEARCHED, "patch": "tuned", "patch_tokens": 1000, "states": 5}
    place.run(**more, compare_energies="fisher")


def verbs(place):
    """The verbs that open a run again, and those that look at a model."""
    run = place.run(patch="none")
    model = place.shared.checkpoint()
    for name in baselines.registry.names():
        place.type("baseline", name, run)
    place.type("solve", run, "--remove", 1)
    place.type("rank", run, "--remove", 1)
    place.type("excise", run, "--blocks", "1,4", "--patch", "linear")
    place.type("evaluate", run, "--blocks", "1,4")
    plain = ("--device", place.device)
    scores = ("--out", place.out / "scores.json")
    place.type("evaluate", run / "model", "--original", model, *plain, *scores)
    place.type("inspect", model, *plain)
    place.type("plan", model, *plain, "--remove", 2, "--length", 16)


def deep(place, blocks, remove, units="blocks"):
    """A deep cut, with the search among patched states, chooses the blocks of the CPU."""
    model = str(place.shared.checkpoint(num_hidden_layers=blocks))
    more = {**SEARCHED, "patch_tokens": 20_000, "batch_tokens": 512, "remove": remove}
    given = {**FEW, **more, "model": model, "calibration": str(place.text)}
    given["units"] = units

    def search(device, out):
        isingcut.prune(**given, device=device, out=str(out))

    def chosen(folder):
        return json.loads((folder / "candidates.json").read_text())["chosen"]["removed"]

    name = f"deep-{units}-{blocks}"
    expected = place.shared.folder(name, functools.partial(search, "cpu"))
    search(place.device, place.out)
    assert chosen(place.out) == chosen(expected)


def streamed(place):
    run = place.run(stream="on", **SEARCHED, compare_energies="empirical-fisher")
    for name in ("block-influence", "angular-window"):
        place.type("baseline", name, run)


def tasks(place):
    """Likelihoods, answers that are generated, and a text."""
    data = place.out / "data"
    for name, make in (
        ("arc_easy/test", arc),
        ("gsm8k/test", gsm8k),
        ("gsm8k/train", gsm8k),
    ):
        write_jsonl(data / f"{name}.jsonl", [make(i)[1] for i in range(16)])
    model = str(place.shared.checkpoint(max_position_embeddings=2048))
    run = place.run(
        model=model,
        choose="tasks",
        patch="none",
        data=str(data),
        tasks="arc_easy",
        questions=12,
    )
    names = ("--tasks", "arc_easy,gsm8k", "--questions", 2)
    place.type("evaluate", run, *names, "--data", data, "--overwrite")


def energies(place, **more):
    later = ("patch_tokens", "random_states", "states", "rank_samples")
    given = {k: v for k, v in FEW.items() if k not in later}
    given |= {"model": str(place.shared.checkpoint()), "calibration": str(place.text)}
    for name in energy_parts.names():
        effort = {"effort": "20"} if name == "refined" else {}
        given |= {"device": place.device, "out": str(place.out / name), "energy": name}
        isingcut.energy(**given, **effort, **more)


def gguf_file(place):
    return write_packed(place.out / "tiny.gguf", GGMLQuantizationType.Q4_1)


def from_gguf(place):
    place.type("evaluate", place.run(model=str(gguf_file(place))))


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


def healing(place, method):
    for patch in ("none", "linear"):
        place.heal(method=method, patch=patch, overwrite=True)


def healing_in_half(place):
    place.heal(dtype="bfloat16", trainer={**TRAINING, "gradient_checkpointing": True})
    place.run(heal="60tokens", dtype="bfloat16")


def patch_alone(place):
    place.heal(method="none", patch="tuned", samples=40)


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


def own_text(place):
    place.run(calibration="self", patch="linear", patch_tokens=64)


def eager(place):
    place.run(
        attention="eager",
        dtype="bfloat16",
        batch_tokens=None,
        patch="tuned",
        patch_tokens=200,
    )


def rows(place):
    """Fits on fewer tokens than a layer has inputs, also of outputs with a bias."""
    few = {"patch_tokens": 100, "drop": "2,3"}
    place.run(model=str(place.shared.checkpoint(intermediate_size=512)), **few)
    with mock.patch.object(_Fitting, "ways", (False,)):
        place.run("outputs", family="gpt2", **few, patch="tuned")


def slopes(place):
    """A search long enough for exchanges by slope."""
    model = place.shared.checkpoint(num_hidden_layers=8)
    place.run(model=str(model), energy="auto", effort="200", samples=16)


def timed_healing(place):
    """A healing whose budget is a time, which measures its steps first."""
    measure = train.step_times

    def measured(job):
        # So slow that few steps follow.
        return [(tokens, 10 + seconds) for tokens, seconds in measure(job)]

    with mock.patch.object(train, "step_times", measured):
        few = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
        place.heal(train="1min", trainer=few)


def gates(place):
    """Gates that scale a block by any number, as energies of plug-ins do."""
    replay = load(place.shared.checkpoint(), device=place.device.split(",")[0]).replay
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
    # The longest first, so that no processor waits for them.
    "deep, 13 of 32": functools.partial(deep, blocks=32, remove=13),
    "deep, 6 of 12": functools.partial(deep, blocks=12, remove=6),
    "deep, sublayers": functools.partial(deep, blocks=6, remove=5, units="sublayers"),
    "range": functools.partial(Place.run, remove="1..2"),
    "budget": functools.partial(Place.run, remove="", budget="params=20%,speed=1%@16"),
    "gguf": from_gguf,
    "heal lora": functools.partial(healing, method="lora:2"),
    "heal full": functools.partial(healing, method="full"),
    "heal, bfloat16": healing_in_half,
    "heal, resumed": resumed,
    "heal, timed": timed_healing,
    "patch alone": patch_alone,
    "rows": rows,
    "slopes": slopes,
    "gates": gates,
    "images": images,
    "run": default,
    "verbs": verbs,
    "tasks": tasks,
    "streamed": streamed,
    "mtp": mtp,
    "chat": chat,
    "own text": own_text,
    "eager, bfloat16": eager,
    "budget, packed": packed,
    "sublayers": sublayers,
    "energies": energies,
    "energies, streamed": functools.partial(energies, stream="on"),
    **{
        f"family {family}": functools.partial(
            Place.run, family=family, must_remove="2,3"
        )
        for family in ("gemma2", "qwen3_moe", "gpt2", "bamba", "phi3")
    },
    "search, gemma2": functools.partial(
        Place.run, family="gemma2", energy="auto", effort="20"
    ),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", PATHS)
def test_card_path(name, count, shared, text, tmp_path):
    with short(), fake_cards(count) as cards:
        device = ",".join(str(card.device) for card in cards)
        PATHS[name](Place(device, tmp_path, shared, text))
