"""Checks of one architecture, on a tiny random model of it."""

import copy
import functools
import itertools
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.auto import modeling_auto

from cards import fake_cards
from isingcut.errors import (
    ArchitectureError,
    IsingcutError,
    VerificationError,
    one_line,
)
from isingcut.formats.architectures.blocks import stop_rescaling
from isingcut.formats.architectures.cuts import legality
from isingcut.formats.checkpoints import Checkpoint
from isingcut.formats.libraries import quiet_transformers
from isingcut.ising.states import blocks_of
from isingcut.models.placement import connect, place
from isingcut.models.sublayers import check_sublayers, find_removed, split_layers
from isingcut.models.verify import random_tokens, reload
from sweep.caches import compare_cache
from sweep.gates import check_gates
from sweep.images import invent_images
from sweep.mtp import MtpLayers, add_mtp_layers, check_mtp_layers
from sweep.shrink import tiny_configuration
from tiny import (
    Replay,
    excise,
    find_stack,
    inspect_model,
    random_model,
    relative_difference,
    skip_blocks,
    states_of,
    tiny_checkpoint,
    tiny_model,
    verify,
)

_TOLERANCE = 1e-5
_MOST_PARAMETERS = 8_000_000
_MAPPINGS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}


@dataclass(frozen=True)
class Entry:
    """A model type and an auto class that builds it."""

    model_type: str
    auto_class: str

    @property
    def name(self):
        """The model type, marked if it is of the image-text class."""
        causal = self.auto_class == "AutoModelForCausalLM"
        return self.model_type if causal else f"{self.model_type} (image-text)"

    @property
    def factory(self):
        """The auto class."""
        return getattr(transformers, self.auto_class)

    @property
    def built(self):
        """The model type, and the name of the class that the auto class builds."""
        return self.model_type, getattr(modeling_auto, _MAPPINGS[self.auto_class])[
            self.model_type
        ]


def entries():
    """Return all entries of the installed transformers."""
    return [
        Entry(model_type, auto_class)
        for auto_class, mapping in _MAPPINGS.items()
        for model_type in getattr(modeling_auto, mapping)
    ]


@dataclass(frozen=True)
class Report:
    """The result for one architecture.

    Args:
        name: a family, or a model type with its auto class.
        outcome: ``"passed"``, ``"refused"``, ``"failed"`` or ``"not built"``.
        kinds: block kinds, with their counts.
        rows: legality rows, in words.
        states: number of states cut and compared.
        difference: largest relative logit difference.
        sublayer: whether the sublayer gate works (else only the block gate does).
        reason: why it was refused, failed or was not built.
        unseen: why a model that takes images was proven on text only; else empty.
        mtp: its MTP layers, which every cut kept unless the outcome is ``"failed"``.
        drafts: whether transformers generates with them, with the same tokens as without.
        unsplit: why its layers are not split into sublayers; empty if they are, and a cut without
            two of them is exact.
        kv_wrong: how the counted bytes of its cache differ from the real ones; else empty.
    """

    name: str
    outcome: str
    kinds: str = ""
    rows: str = ""
    states: int = 0
    difference: float = 0.0
    sublayer: bool = True
    reason: str = ""
    unseen: str = ""
    mtp: MtpLayers | None = None
    drafts: bool = False
    unsplit: str = ""
    kv_wrong: str = ""

    def facts(self):
        """Return what the documentation says of the architecture."""
        names = ("name", "outcome", "reason", "rows", "drafts", "unsplit")
        facts = {name: getattr(self, name) for name in names}
        facts["text_only"] = bool(self.unseen)
        if self.mtp and self.states:
            facts["mtp"] = "numbered on" if self.mtp.numbered_on else "named"
        return {name: fact for name, fact in facts.items() if fact}


class NotBuilt(Exception):
    """No tiny model could be made, so that the architecture was not checked."""


def check_family(family, folder, *, states=6, **changes):
    """Run all checks of one family.

    Args:
        family: a key of `FAMILIES`.
        folder: an empty folder to write checkpoints to.
        states: number of legal states to cut.
        changes: configuration fields to set.
    """

    def build():
        tiny_checkpoint(family, folder / "source", **changes)
        return tiny_model(family, **changes)

    return _report(family, build, folder, states)


def check_entry(entry, folder, *, states=2):
    """Run all checks of one entry of transformers' mappings; arguments as of `check_family`."""

    def build():
        try:
            model = random_model(entry.factory, tiny_configuration(entry.model_type))
            _refuse_large(model)
        except Exception as error:
            raise NotBuilt(one_line(error)) from error
        model.save_pretrained(folder / "source")
        return model

    report = _report(entry.name, build, folder, states)
    # A cut that is proven was read back completely.
    missing = 0 if report.states else _count_missing(entry.factory, folder / "source")
    reason = f"transformers saves it and reads it back without {missing} of its tensors"
    return Report(entry.name, "not built", reason=reason) if missing else report


def _count_missing(factory, source):
    """Return how many tensors transformers lacks when it reads its own checkpoint back."""
    with suppress(Exception), quiet_transformers():
        return len(
            factory.from_pretrained(source, output_loading_info=True)[1]["missing_keys"]
        )
    return 0  # Maybe a checkpoint of another auto class, or none.


def _refuse_large(model):
    count = sum(p.numel() for p in model.parameters())
    if count > _MOST_PARAMETERS:
        name, largest = max(model.named_parameters(), key=lambda item: item[1].numel())
        raise NotBuilt(
            f"{count:,} parameters are too many for a tiny model; the largest, {name}, has the "
            f"shape {list(largest.shape)}"
        )


def _report(name, build, folder, states):
    mtp = None
    try:
        with quiet_transformers():
            model = build()
            mtp = add_mtp_layers(model, folder / "source")
            return replace(_check(model, mtp, folder, states), name=name)
    except NotBuilt as error:
        return Report(name, "not built", reason=str(error))
    except IsingcutError as error:
        outcome = "failed" if isinstance(error, VerificationError) else "refused"
        reason = str(error)
    except Exception as error:
        # A library's error that isingcut does not catch is a failure of isingcut.
        outcome = "failed"
        reason = one_line(error)
    return Report(name, outcome, reason=reason.replace(f"{folder}/", ""), mtp=mtp)


def _check(model, mtp, folder, states):
    source = folder / "source"
    stop_rescaling(model)
    shown = inspect_model(source)
    if shown.refusal:
        raise ArchitectureError(shown.refusal)
    stack = find_stack(model)
    # Inspection finds the blocks without weights.
    assert shown.stack.kinds == stack.kinds, (
        "inspection shows other blocks than the model has"
    )
    rows = legality(model.config.to_dict(), stack)
    tokens = random_tokens(model, 2, 20)
    chosen = legal_states(stack, rows, states)
    worst = 0.0
    sublayer = True
    reason = ""
    unseen = ""
    drafts = False
    try:
        replay = Replay(model.requires_grad_(False))
        worst = _replay_is_forward(replay, tokens, chosen)
        sublayer = check_gates(model, stack, tokens)
        _two_cards_are_one(replay, tokens)
    except ArchitectureError as error:
        reason = f"cuts exactly at given blocks, but is not measured: {error}"
    for number, removed in enumerate(chosen):
        out = folder / f"cut{number}"
        try:
            excise(source, removed, out, max_shard_bytes=60_000)
        except ArchitectureError as error:
            raise AssertionError(
                f"blocks {removed} are legal, but not cut: {error}"
            ) from error
        other = next(i for i in range(len(stack)) if i not in removed)
        # Both proofs load the same checkpoint.
        with mock.patch.multiple(
            "isingcut.models.verify", NEW_TOKENS=8, reload=functools.cache(reload)
        ):
            proof = verify(model, removed, out, images=invent_images)
            with suppress(VerificationError):
                verify(model, [other, *removed[1:]], out)
                raise AssertionError(
                    f"the proof does not tell blocks {removed} from others"
                )
        if mtp is not None:
            drafts = check_mtp_layers(mtp, model, removed, source, out)
        worst = max(worst, proof.difference)
        unseen = next((r for r in proof.remarks if "on text only" in r), "")
    unsplit = ""
    kv_wrong = ""
    if not reason:
        kv_wrong = compare_cache(model, shown.stack)
        try:
            worst = max(worst, _check_sublayers(model, tokens, folder))
        except ArchitectureError as error:
            unsplit = str(error)
    return Report(
        "",
        "failed" if kv_wrong else "refused" if reason else "passed",
        kinds=", ".join(f"{n} {kind}" for kind, n in Counter(stack.kinds).items()),
        rows="; ".join(dict.fromkeys(row.reason for row in rows)),
        states=len(chosen),
        difference=worst,
        sublayer=sublayer,
        reason=reason,
        unseen=unseen,
        mtp=mtp,
        drafts=drafts,
        unsplit=unsplit,
        kv_wrong=kv_wrong,
    )


def _check_sublayers(model, tokens, folder):
    """Cut a mixer and an MLP of different layers; return the largest relative difference.

    The model stays split.
    """
    split_layers(model)
    check_sublayers(model)
    stack = find_stack(model)
    rows = legality(model.config.to_dict(), stack)
    blocks, other = _two_sublayers(stack, rows)
    worst = _replay_is_forward(Replay(model), tokens, [blocks])
    source = folder / "source"
    out = folder / "sublayers"
    removed = find_removed(Checkpoint.read(source), model, blocks)
    excise(source, removed, out)
    with mock.patch.multiple(
        "isingcut.models.verify", NEW_TOKENS=8, reload=functools.cache(reload)
    ):
        proof = verify(model, removed, out, images=invent_images)
        with suppress(VerificationError):
            verify(model, stack.remove(other), out)
            raise AssertionError(
                f"the proof does not tell sublayers {blocks} from {other}"
            )
    return max(worst, proof.difference)


def _two_sublayers(stack, rows):
    """Return two states without a mixer and an MLP, of different layers: a legal one, and one in
    which another mixer is removed.

    Raises:
        ArchitectureError: no such state is legal.
    """
    halves = [i for i, k in enumerate(stack.layers) if stack.layers.count(k) == 2]
    mixers = sorted(halves[::2], key=lambda i: "attention" not in stack.kinds[i])
    for state in itertools.product(mixers, reversed(halves[1::2])):
        bits = states_of(len(stack), [state])
        apart = stack.layers[state[0]] != stack.layers[state[1]]
        if apart and all(row.satisfied(bits)[0] for row in rows):
            other = next(i for i in mixers if i != state[0])
            return sorted(state), sorted([other, state[1]])
    raise ArchitectureError("no mixer and MLP of different layers may be removed")


def _two_cards_are_one(whole, tokens):
    """Check that a model placed over two cards gives the logits of the model that is not placed."""

    def compute(replay):
        recording = replay.record(tokens.to(replay.device))
        stream = recording.entered
        for i in range(len(replay)):
            stream = recording.block(i, stream)
        at_once = replay.text(input_ids=recording.input_ids, use_cache=False).logits
        rows = (recording.logits(stream[s], s) for s in range(len(tokens)))
        return [logits.tolist() for logits in (at_once, *rows)]

    with torch.no_grad():
        # Cards have no fused attention, which rounds in another order.
        with sdpa_kernel(SDPBackend.MATH):
            expected = compute(whole)
        with fake_cards(2) as cards:
            placed = copy.deepcopy(whole.model)
            connect(placed, place(placed, [card.device for card in cards]))
            found = compute(Replay(placed))
    assert found == expected, "two cards do not give the logits of one device"


def legal_states(stack, rows, wanted):
    """Return different legal states: with the first block, the last, both, and random ones.

    Raises:
        ArchitectureError: the legality rows leave no state but the original.
    """
    n = len(stack)
    bits = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1 > 0
    bits = bits[bits.sum(1) < n]
    for row in rows:
        bits = bits[row.satisfied(bits)]
    if len(bits) == 0:
        raise ArchitectureError("no state is legal: every block has to stay")
    bits = bits[np.random.default_rng(0).permutation(len(bits))]
    first = bits[:, 0]
    last = bits[:, -1]
    picks = range(len(bits))
    for mask in (first & last, last & ~first, first & ~last):
        picks = [*(int(i) for i in np.flatnonzero(mask)[:1]), *picks]
    unique = list(dict.fromkeys(picks))[:wanted]
    return [blocks_of(bits[p]) for p in unique]


def _replay_is_forward(replay, tokens, states):
    """Return the largest relative difference of replayed from real passes. The original comes
    after all states, to show changes that a state leaves in the recorded calls."""
    recording = replay.record(tokens)
    worst = 0.0
    for removed in [*states, []]:
        with torch.no_grad():
            with skip_blocks(replay.model, removed):
                expected = replay.text(input_ids=tokens, use_cache=False).logits
            stream = recording.entered
            for i in range(len(replay)):
                stream = stream if i in removed else recording.block(i, stream)
            rows = [recording.logits(stream[s], s) for s in range(len(tokens))]
        worst = max(worst, relative_difference(expected, torch.stack(rows)))
    assert worst <= _TOLERANCE, f"replay differs from a forward pass by {worst:.1e}"
    return worst
