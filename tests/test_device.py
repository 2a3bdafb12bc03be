"""Every computing step on one fake device and on several, without tensors of any other device.

The values must be those of the CPU up to rounding: the losses over the vocabulary are compiled
for the CPU, but computed another way on a device. A model placed over several devices gives the
bits of one, in a distillation up to rounding. `benchmarks/cards.py` says what these tests cannot
detect.
"""

import itertools
from contextlib import suppress
from unittest import mock

import numpy as np
import pytest
import torch

from card import short
from cards import MixedDevicesError, fake_cards
from isingcut.data import generation
from isingcut.data.chat import ChatWriter
from isingcut.energies.search.evaluator import Evaluator
from isingcut.evaluation import quality as evaluate
from isingcut.evaluation import speed as timing
from isingcut.evaluation.answers import answer_scores
from isingcut.healing.repairs.linear import _Fitting, fit_patches
from isingcut.healing.training.batches import batch_of
from isingcut.healing.training.student import install
from isingcut.measure.packed import changed_losses
from isingcut.measure.streams import Kept
from isingcut.models.placement import connect, place
from isingcut.models.replay import Recording
from shared import parametrize, run_tiny
from test_baselines import part
from tiny import (
    Store,
    StreamedReplay,
    Work,
    gate_gradients,
    measure,
    random_tokens,
    replay_of,
    tiny_model,
    tiny_tokenizer,
)

CPU = torch.device("cpu")


@pytest.fixture
def device():
    with fake_cards() as (card,):
        yield card.device


def states():
    return np.random.default_rng(1).random((4, 4)) < 0.4


class Place:
    """Models on some devices, for the steps."""

    def __init__(self, folder, *devices):
        self.device = devices[0]
        self.devices = devices
        self.folder = folder

    def model(self, family="llama", seed=0):
        model = tiny_model(family, seed=seed, num_hidden_layers=4).requires_grad_(False)
        if len(self.devices) > 1:
            connect(model, place(model, self.devices))
        return model.to(self.device) if len(self.devices) == 1 else model

    def replay(self, family="llama", streamed=False):
        if not streamed:
            return replay_of(self.model(family))
        return StreamedReplay(Store(self.folder, torch.float32, self.device))


def losses(place, family="llama", streamed=False):
    replay = place.replay(family, streamed)
    found = measure(replay, random_tokens(), states(), work=Work(32))
    return np.stack([found.kl_sums, found.nll_sums])


def changed(place, family="llama", streamed=False):
    def change(name, own):
        return None if "norm" in name else own + 0.02 * own.roll(1, 0)

    replay = place.replay(family, streamed)
    return changed_losses(replay, random_tokens(), change, Work(32), "changed", [2])


def gate_rows(place, family="llama", streamed=False, seed=None):
    replay = place.replay(family, streamed)
    return gate_gradients(replay, random_tokens(), work=Work(32), label_seed=seed)


def searched(place):
    evaluator = Evaluator(place.replay(), random_tokens(), Work(32), seed=0)
    evaluator.measure(states(), 3, "measuring")
    known = [k.sums[:3] for k in evaluator.known.values()]
    return np.concatenate(
        [*known, evaluator.slopes(states()[0], 3), evaluator.one_pass(2)[0]]
    )


def streamed_slopes(place):
    replay = place.replay(streamed=True)
    return Evaluator(replay, random_tokens(), Work(32), seed=0).slopes(states()[0], 4)


def asked(place, family="llama", streamed=False):
    replay = place.replay(family, streamed)
    rows = [(tuple(row), 1 + i % 3) for i, row in enumerate(random_tokens().rows)]
    likely, greedy = answer_scores(replay, rows, states(), Work(32))
    return np.stack([likely, greedy])


def figures(place, streamed=False):
    if streamed:
        pair = [place.replay(streamed=True) for _ in range(2)]
    else:
        pair = [place.model(seed=seed) for seed in range(2)]
    found = evaluate.quality(*pair, random_tokens())
    return [found.kl, found.before.nll, found.after.nll]


def written(place):
    model = place.model()
    tokenizer = tiny_tokenizer()
    prompt = generation.prompt_ids(tokenizer, "hello")
    long = generation.prompt_ids(tokenizer, "hello, how are you?")
    rows = generation.generate_rows(model, tokenizer, [prompt, long], 8)
    sampled = list(
        itertools.islice(generation.sample_from_model(model, tokenizer, 3, 8, 0), 3)
    )
    model.generation_config.eos_token_id = [*range(40, 56)]
    chat = ChatWriter(model, tokenizer, lambda: "w")(0, 1.0)
    asked = str([next(chat) for _ in range(3)]).encode()
    found = [*itertools.chain.from_iterable(row for row, _ in rows), *np.ravel(sampled)]
    return [*found, *asked]


def timed(place):
    ticks = itertools.count()
    both = {"before": place.model(), "after": place.model(seed=1)}
    speeds = timing.speed(
        both, random_tokens(), new_tokens=2, repeats=1, clock=lambda: next(ticks) ** 2
    )
    # Times cannot be compared.
    for streamed in (False, True):
        assert min(place.replay(streamed=streamed).latency(8, 1)) > 0
    return len(speeds)


def patched(place, reads):
    given = (place.replay(), random_tokens(), [1, 3], Work(32))
    with mock.patch.object(_Fitting, "ways", (reads,)):
        return weights_of(fit_patches(*given))


def weights_of(*fits):
    patches = [patch for fit in fits for patch in fit.patches]
    return np.concatenate([p.parameters["weight"].cpu().ravel() for p in patches])


def patched_again(place):
    """Fit the patches of two states with the original's streams of the first kept on the host."""
    given = (place.replay(), random_tokens())
    kept = Kept()
    found = [fit_patches(*given, state, Work(32), kept=kept) for state in ([1], [1, 3])]
    streams = itertools.chain(*kept.original.values())
    assert {stream.device for stream in streams} == {CPU}
    return weights_of(*found)


def distilled(place, family="llama"):
    """Train two steps; return their losses and the norm of the head's last gradient."""
    teacher = place.model(family)
    student = place.model(family, seed=1).requires_grad_(True).train()
    tokens = random_tokens()
    batch = batch_of(tokens, range(tokens.samples))
    batch = {name: value.to(place.device) for name, value in batch.items()}
    install(student, student, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    found = []
    for _ in range(2):
        loss = student(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return [*found, student.get_output_embeddings().weight.grad.norm().item()]


def chosen(place):
    given = (place.replay(), random_tokens(), 2, Work(32))
    # The other baselines use only measured losses.
    own = ("angular-window", "block-influence")
    return [part(name).choose(*given, seed=0).removed for name in own]


# gemma2 ends in a soft cap, so its head is not split.
STEPS = {
    "losses": losses,
    "losses, head in one": lambda p: losses(p, "gemma2"),
    "losses, streamed": lambda p: losses(p, streamed=True),
    "other weights": changed,
    "other weights, head in one": lambda p: changed(p, "gemma2"),
    "other weights, streamed": lambda p: changed(p, streamed=True),
    "gradients": gate_rows,
    "gradients, head in one": lambda p: gate_rows(p, "gemma2"),
    "gradients, drawn labels": lambda p: gate_rows(p, seed=3),
    "gradients, drawn labels, head in one": lambda p: gate_rows(p, "gemma2", seed=3),
    "gradients, streamed": lambda p: gate_rows(p, streamed=True),
    "search": searched,
    "search slopes, streamed": streamed_slopes,
    "answers": asked,
    "answers, head in one": lambda p: asked(p, "gemma2"),
    "answers, streamed": lambda p: asked(p, streamed=True),
    "quality": figures,
    "quality, streamed": lambda p: figures(p, streamed=True),
    "generation": written,
    "speed and latency": timed,
    "patch of what is read": lambda p: patched(p, True),
    "patch of what is written": lambda p: patched(p, False),
    "patches of two states": patched_again,
    "distillation": distilled,
    "distillation, head in one": lambda p: distilled(p, "gemma2"),
    "baselines": chosen,
}


@parametrize("step", STEPS)
def test_a_step_keeps_to_its_devices(step, shared):
    folder = shared.checkpoint(num_hidden_layers=4)
    expected = np.asarray(STEPS[step](Place(folder, CPU)))
    with fake_cards(4) as cards:
        devices = [card.device for card in cards]
        one, several = (
            np.asarray(STEPS[step](Place(folder, *devices[:n]))) for n in (1, 3)
        )
    np.testing.assert_allclose(one, expected, rtol=2e-4, atol=2e-5)
    # A norm of gradients may be summed in another order, depending on its place in memory.
    rounding = 1e-6 if step.startswith("distillation") else 0
    np.testing.assert_allclose(several, one, rtol=rounding)


def test_a_stream_that_stays_on_its_card_is_refused():
    with (
        pytest.raises(MixedDevicesError),
        fake_cards(2) as (one, two),
        mock.patch.object(Recording, "move_to_block", lambda self, i, hidden: hidden),
    ):
        gate_rows(Place(None, one.device, two.device))


@pytest.mark.slow
def test_a_whole_run_on_several_cards_writes_the_files_of_one(
    shared, text, no_speed, tmp_path
):
    with short(), fake_cards(4) as cards:
        names = [",".join(str(card.device) for card in cards[:n]) for n in (1, 4)]
        for device in names:
            model = shared.checkpoint(num_hidden_layers=4)
            few = {"remove": 2, "states": 3, "patch_tokens": 100}
            run_tiny(model, text, tmp_path / device, device=device, **few)
    stages = ("hamiltonian.safetensors", "candidates.json", "evaluation.json")
    one, other = (tmp_path / name for name in names)
    for file in [file for name in (*stages, "model/[!.]*") for file in one.glob(name)]:
        found = (other / file.relative_to(one)).read_bytes()
        found = found.replace(other.name.encode(), one.name.encode())
        assert file.read_bytes() == found, file


def mixed(operation):
    """Return whether an operation on tensors (device, CPU, number on CPU) is refused as mixed."""
    try:
        with fake_cards() as (card,):
            operation(
                torch.ones(3, device=card.device), torch.ones(3), torch.tensor(2.0)
            )
    except MixedDevicesError:
        return True
    return False


@parametrize(
    "refused, operation",
    [
        (True, lambda d, c, n: d + c),
        (True, lambda d, c, n: torch.cat([d, c])),
        (True, lambda d, c, n: n.add_(d.sum())),
        (True, lambda d, c, n: c[d > 0]),
        (True, lambda d, c, n: torch.mm(d[:, None], d[None], out=torch.empty(3, 3))),
        (
            True,
            lambda d, c, n: torch.rand(2, generator=torch.Generator(), device=d.device),
        ),
        (False, lambda d, c, n: d * n),
        (False, lambda d, c, n: d.masked_fill(d > 0, n)),
        (False, lambda d, c, n: d[c > 0]),
        (False, lambda d, c, n: c.copy_(d)),
    ],
)
def test_tensors_meet_by_the_rules_of_a_gpu(refused, operation):
    assert mixed(operation) == refused


def test_a_mix_that_the_code_catches_is_not_forgotten():
    with (
        pytest.raises(MixedDevicesError),
        fake_cards() as (card,),
        suppress(RuntimeError),
    ):
        torch.ones(2, device=card.device) + torch.ones(2)


def test_numbers_leave_the_device_by_a_copy_alone(device):
    x = torch.arange(3, device=device)
    with pytest.raises(TypeError, match=r"lazy:0 device type tensor to numpy"):
        x.numpy()
    assert x.cpu().numpy().tolist() == x.tolist() == [0, 1, 2]
