"""What the files of a run say, in sentences and maps, for reports, cards and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from isingcut.report.rows import plus_minus

# Share of a split that other splits hold too; boilerplate of ordinary text is less.
MUCH_SHARED = 0.02
# How much larger than that of all text the KL on one part of it is where that is worth a warning.
MUCH_WORSE = 2.0
_SOURCES = {"-": "standard input", "self": "text that the model wrote"}


def numbers(blocks: Sequence[int]) -> str:
    """Block numbers as a list in words."""
    listed = [str(b) for b in blocks]
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"


def listed(removed: Sequence[int]) -> str:
    """Blocks as a row of numbers."""
    return " ".join(map(str, removed))


def search_warnings(meta: Mapping[str, Any], removals: Sequence[str]) -> list[str]:
    """That an energy corrected near some removals is used for others, where it is so.

    Args:
        meta: the energy's provenance.
        removals: what is solved for.
    """
    near = list(meta.get("search", {}).get("targets", {}))
    others = [removal for removal in removals if near and removal not in near]
    if not others:
        return []
    return [
        f"this energy was corrected near {', '.join(near)}; for {', '.join(others)} it is less "
        "sure: search there too (a new run, --remove 4..12 takes several at once), or use "
        "--energy pairwise, which favours no size"
    ]


def patch_warnings(found: Mapping[str, Any]) -> list[str]:
    """Which cuts were not patched, and why, and that a patch did not help where it did not.

    One line where the reason is the same for all cuts.

    Args:
        found: with ``unpatched``, or with a ``patch`` that has it: a record of a checkpoint, an
            evaluation or a healing.
    """
    cuts = [*(found.get("unpatched") or []), *((found.get("patch") or {}).get("unpatched") or [])]
    patched = (found.get("patch") or {}).get("cuts")
    reasons = dict.fromkeys(cut["reason"] for cut in cuts)
    if len(reasons) == 1 and not patched:
        return [f"not patched: {next(iter(reasons))}"]
    said = []
    if found.get("last") == "patched" and found["kl"] > found["cut"]["kl"]:
        said.append(
            f"the patch did not help: on unseen text the KL is {found['kl']:.4f} with it and "
            f"{found['cut']['kl']:.4f} without; give it more --patch-tokens or other text, or take "
            "the exact cut (--patch none)"
        )
    return said + [
        f"not patched at blocks {cut['removed'][0]} to {cut['removed'][-1]}: {cut['reason']}"
        for cut in cuts
    ]


def overlap_warnings(overlap: Mapping[str, float]) -> list[str]:
    """That a split's text stands in others too, where there is more of it than comes by chance."""
    much = [f"{s:.0%} of the {name} text" for name, s in overlap.items() if s >= MUCH_SHARED]
    if not much:
        return []
    return [
        f"{' and '.join(much)} stands in another split too, so that figures on it are too good; "
        "give text that does not repeat itself"
    ]


def part_warnings(evaluation: Mapping[str, Any]) -> list[str]:
    """Which parts of a mixture the final model is much worse on than on all of it, beyond noise."""
    whole, last = evaluation["kl"], evaluation.get("last", "cut")
    return [
        f"on {name} the {last} model's KL is {plus_minus(part['kl'], part['kl_se'])}, more than "
        f"{MUCH_WORSE:g} times the {whole:.4f} of all text: where that text matters, give it more "
        "weight in --calibration, or remove fewer blocks"
        for name, part in evaluation.get("parts", {}).items()
        if part["kl"] - 2 * (part["kl_se"] or 0.0) > MUCH_WORSE * whole
    ]


def patch_story(patch: Mapping[str, Any]) -> str:
    """Where maps were folded in, on which text they were fitted, and how that was proven.

    Args:
        patch: of the record of a checkpoint, with a cut that is patched.
    """
    which = "each cut that can take one" if patch["unpatched"] else "each cut"
    said = f"A linear map was folded into the layer before {which}"
    text, proof = patch.get("text"), patch.get("proof")
    if text is not None:
        own, further = text["searched"], text["samples"] - text["searched"]
        source = _SOURCES.get(text["source"], text["source"])
        samples = f"{own} samples that the energy was measured on"
        samples += f" and {further} others" if further > 0 else ""
        if (patch.get("tuning") or {}).get("held_out_kl"):
            samples += ", some of them held out for the tuning"
        said += (
            f", fitted on {text['tokens']:,} tokens of {source} ({samples}), none of them "
            "in the splits that rank and report"
        )
        if text["short"]:
            said += f"; {text['asked']:,} were asked for, but {text['short']}"
    said += "."
    said += _tuning_words(patch.get("tuning") or {})
    if proof is not None:
        said += (
            " The exact cut was proven before; then the patched checkpoint was reloaded and its "
            "logits compared with those of the original with the same blocks skipped and the same "
            f"layers replaced: on {proof['inputs']} they differ by {proof['difference']:.1e} of "
            "their size."
        )
    return said


def was_tuned(patch: Mapping[str, Any]) -> bool:
    """Whether layers beside the cuts have other weights than the fit gave."""
    held_out = (patch.get("tuning") or {}).get("held_out_kl") or [0.0]
    return bool(min(held_out) < held_out[0])


def _tuning_words(tuning: Mapping[str, Any]) -> str:
    """What tuning a patch won on its held-out samples, or why there was none."""
    if tuning.get("left_out"):
        return f" It was not tuned: {tuning['left_out']}."
    if not tuning.get("held_out_kl"):
        return ""
    first, best = tuning["held_out_kl"][0], min(tuning["held_out_kl"])
    if not tuning["layers"]:
        return " Tuning the layers beside the cuts won nothing on samples held out."
    blocks = ", ".join(map(str, dict.fromkeys(layer["block"] for layer in tuning["layers"])))
    return (
        f" Then the linear layers of blocks {blocks} were tuned on the loss for {tuning['steps']} "
        f"steps: KL on {tuning['held_out_predictions']:,} predictions held out {first:.3f} -> "
        f"{best:.3f}."
    )


def patch_words(evaluation: Mapping[str, Any]) -> str:
    """What the patch won back of what the cut had lost; empty where there is no patch."""
    cut = evaluation.get("cut")
    patched = evaluation.get("patched") or evaluation["after"]
    if not cut or (evaluation.get("last") == "healed" and not evaluation.get("patched")):
        return ""
    lost = cut["nll"] - evaluation["before"]["nll"]
    if lost <= 0:
        return ""
    won = 100 * (cut["nll"] - patched["nll"]) / lost
    said = f"The patch wins back {won:.0f} % of the log-perplexity that the cut lost"
    if evaluation.get("last") == "healed":
        won = 100 * (cut["nll"] - evaluation["after"]["nll"]) / lost
        said += f", patch and distillation together {won:.0f} %"
    return f"{said}."


def healing_words(healing: Mapping[str, Any]) -> str:
    """How the model was healed and on what the figures are measured."""
    said = []
    options = healing.get("options") or {}
    if healing.get("patch"):
        words = "A linear patch was fitted at each cut"
        scores = healing["patch"].get("scores")
        if scores:
            words += f" (alone it brings the KL to {plus_minus(scores['kl'], scores['kl_se'])})"
        said.append(words + ".")
    if healing.get("steps"):
        seen = healing.get("tokens_seen")
        tokens = "" if seen is None else f" over {seen:,} tokens"
        method = f" (`{options['method']}`)" if options.get("method") else ""
        said.append(f"Distillation from the original{method}{tokens}.")
    if r := healing.get("recipe"):
        said.append(
            f"The budget of {options.get('effort')} bought {r['steps']} steps of {r['batch']} x "
            f"{r['length']} tokens, with a learning rate of up to {r['learning_rate']:g}."
        )
    if healing.get("stopped"):
        why = healing["stopped"]["why"]
        said.append(f"{why[:1].upper()}{why[1:]}.")
    if healing.get("report_tokens"):
        said.append(f"Measured on {healing['report_tokens']} tokens that healing has not seen.")
    original = healing["before"].get("original_perplexity")
    if original is not None:
        said.append(f"The original has perplexity {original:.2f} there.")
    return " ".join(said)


def spectrum_words(spectrum: Mapping[str, Any]) -> str:
    """How many states, from which solver, and whether they are proven to be the lowest."""
    return (
        f"{len(spectrum['states']) - spectrum.get('searched', 0)} states by `{spectrum['solver']}` "
        f"in {spectrum['seconds']:.2f} s, {proof_words(spectrum)}.{searched_words(spectrum)}"
    )


def proof_words(spectrum: Mapping[str, Any]) -> str:
    """Whether the states of a spectrum are known to be the lowest."""
    return "proven to be the lowest" if spectrum["proven"] else "the best found, not proven"


def searched_words(spectrum: Mapping[str, Any]) -> str:
    """How many states of a spectrum came from the search before it; empty for none."""
    more = spectrum.get("searched", 0)
    return f" With them {more} that the search had measured." if more else ""


def state_map(removed: Sequence[int], n: int) -> str:
    """A state as one character a block: # stays, · is removed."""
    gone = set(removed)
    return "".join("·" if i in gone else "#" for i in range(n))


def spectrum_map(
    spectrum: Mapping[str, Any],
    candidates: Mapping[str, Any] | None,
    removed: Sequence[int] | None,
) -> list[str]:
    """The spectrum as monospaced lines: rank, energy, measured KL, one column per block."""
    n = int(spectrum["n"])
    measured = (
        {} if candidates is None else {tuple(r["removed"]): r for r in candidates["candidates"]}
    )
    cells = []
    for state in spectrum["states"]:
        row = measured.get(tuple(state["removed"]))
        chosen = removed is not None and sorted(state["removed"]) == sorted(removed)
        kl = "" if row is None else plus_minus(row["kl"], row["kl_se"])
        rank = f"{'*' if chosen else ' '}{state['rank']}"
        cells.append((rank, f"{state['energy']:.4g}", kl, state_map(state["removed"], n)))
    wide = [
        max(len(h), *(len(c[k]) for c in cells)) for k, h in enumerate(("rank", "energy", "KL"))
    ]
    margin = " " * (sum(wide) + 2 * len(wide))
    tens = "".join(str(i // 10) if i % 10 == 0 else " " for i in range(n)).rstrip()
    head = "  ".join(h.rjust(w) for h, w in zip(("rank", "energy", "KL"), wide, strict=True))
    units = "".join(str(i % 10) for i in range(n))
    lines = [f"{margin}{tens}", f"{head}  {units}"]
    for *figures, blocks in cells:
        shown = "  ".join(f.rjust(w) for f, w in zip(figures, wide, strict=True))
        lines.append(f"{shown}  {blocks}")
    return lines
