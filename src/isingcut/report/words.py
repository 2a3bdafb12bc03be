"""What the files of a run say, in sentences and maps, for reports, cards and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2
from jinja2.environment import TemplateModule

from isingcut.files.documents.scores import EvaluationFile, HealingFile
from isingcut.files.documents.states import (
    ByTasks,
    CandidatesFile,
    CardParts,
    Correlations,
    CutRecord,
    Judged,
    MeasuredState,
    PatchRecord,
    SpectrumFile,
)
from isingcut.report.rows import kl_of, plus_minus

# Share of a split that other splits hold too; boilerplate of ordinary text is less.
MUCH_SHARED = 0.02
# How much larger than that of all text the KL on one part of it is where that is worth a warning.
MUCH_WORSE = 2.0
POOR_SPEARMAN = 0.6
"""Below this rank correlation the energy is called a poor guide."""
FAR_TOO_LOW = 0.5
"""Below this share of its measured loss a state's energy is called far too low."""
FEW_STATES = 30


def numbers(blocks: Sequence[int]) -> str:
    """Block numbers as a list in words."""
    listed = [str(b) for b in blocks]
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"


def listed(removed: Sequence[int]) -> str:
    """Blocks as a row of numbers."""
    return " ".join(map(str, removed))


def sentence(name: str, *about: Any) -> str:
    """What a macro of `templates/words.j2` says of some files, on one line."""
    return " ".join(str(getattr(_sentences(), name)(*about)).split())


@cache
def _sentences() -> TemplateModule:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("isingcut.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "numbers": numbers,
        "listed": listed,
        "kl": lambda row: kl_of(row).text(),
    }
    environment.globals["known_rows"] = _known_rows
    return environment.get_template("words.j2").module


SENTENCES = (
    *("measured_words", "questions_words", "patch_story", "patch_words", "healing_words"),
    "spectrum_words",
)
"""Those that the pages say by themselves."""


def _known_rows(found: CandidatesFile, removed: Sequence[int]) -> list[tuple[MeasuredState, int]]:
    """The first row of a ranking that measured a state, and on how many tokens; or none."""
    few = found.random_tokens or found.tokens
    rows = [(row, found.tokens) for row in found.candidates] + [(row, few) for row in found.random]
    return [(row, n) for row, n in rows if sorted(row.removed) == sorted(removed)][:1]


# The energy ------------------------------------------------------------------------------


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


def fidelity_rows(judged: Mapping[str, Judged]) -> list[tuple[str, ...]]:
    """Rows of the fidelity table: energy, loss, states, Spearman, Kendall, n; none unmeasured."""
    kinds = (
        ("kl", "KL", "candidates and random"),
        ("nll", "NLL", "candidates and random"),
        ("kl_random_only", "KL", "random only"),
    )
    return [
        (
            f"`{energy}`",
            loss,
            states,
            correlation_text(found, "spearman"),
            correlation_text(found, "kendall"),
            str(found.n),
        )
        for energy, losses in judged.items()
        if losses.kl.n
        for key, loss, states in kinds
        if (found := getattr(losses, key)) is not None
    ]


def correlation_text(found: Correlations, name: str) -> str:
    """A rank correlation with its 95 % interval."""
    value, low, high = (getattr(found, f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return "undefined" if found.n else "not measured"
    return f"{value:.2f}" + ("" if None in (low, high) else f" ({low:.2f} to {high:.2f})")


def ranking_warnings(energy: str, candidates: CandidatesFile) -> list[str]:
    """What to know before trusting a choice; empty where the energy ranked and priced it well.

    Args:
        energy: its name.
        candidates: the measured candidates.
    """
    said, chosen = fidelity_warnings(energy, candidates.fidelity.kl), candidates.chosen
    if candidates.energy_unit == "nats/token" and chosen.energy < FAR_TOO_LOW * chosen.kl:
        advice = "search longer (--effort)" if energy == "refined" else "use --energy auto"
        said.append(
            f"`{energy}` puts the chosen state at {chosen.energy:.3g} nats per token, measured "
            f"were {chosen.kl:.3g}: three and more blocks interact here in ways that it does "
            f"not know. Better states may lie where it did not look: {advice}, or remove fewer "
            "blocks."
        )
    return said


def fidelity_warnings(energy: str, found: Correlations) -> list[str]:
    """What a reader must know before trusting the energy; empty when it ranked well."""
    if not found.n:
        return [
            f"How well `{energy}` ranks was not measured (--random-states 0): only that the "
            "candidates have the losses measured is known."
        ]
    value, low = found.spearman, found.spearman_low
    if value is None:
        return [
            f"The rank correlation of `{energy}` with measured losses is undefined here (too few "
            "states, or all alike): how well it ranks is not known."
        ]
    said = []
    if value < POOR_SPEARMAN:
        said.append(
            f"`{energy}` ranked the measured states poorly (Spearman {value:.2f}, below "
            f"{POOR_SPEARMAN}). Do not trust its spectrum beyond the states measured: use more "
            "samples, another --energy, or more --states."
        )
    elif low is not None and low < POOR_SPEARMAN:
        said.append(
            f"The interval of the Spearman correlation of `{energy}` reaches down to {low:.2f}: "
            "that it ranks well is not established; measure more --random-states."
        )
    if found.n < FEW_STATES:
        said.append(f"Only {found.n} states were measured; the correlation is uncertain.")
    return said


# The choice ------------------------------------------------------------------------------


def chosen_by_tasks(found: ByTasks, kl: float, lowest: float) -> str:
    """Why a candidate was chosen by questions, and whether its loss says otherwise.

    Args:
        kl, lowest: its KL, and the lowest of all candidates, nats per token.
    """
    rows, asked = found.candidates, sum(found.by_task.values())
    if len(rows) == 1 or not asked:
        return "the only candidate, no question was asked"
    place = "ahead" if found.ahead else "lowest KL within a standard error of the best"
    best = f"{place} of {len(rows)} on {asked} questions of {', '.join(found.tasks)}"
    if kl <= MUCH_WORSE * lowest:
        return best
    return f"{best}; its KL is {kl:.3g}, the lowest {lowest:.3g}: heal what is to write"


def question_rows(found: ByTasks) -> list[tuple[str, ...]]:
    """Of each candidate: blocks removed, questions, share right, its difference to the chosen
    one's, log-probability of the right answers in nats, p of the test by it."""
    return [
        (
            listed(row.removed),
            str(row.questions),
            "" if row.accuracy is None else f"{row.accuracy:.3f}",
            "chosen"
            if row.difference is None
            else plus_minus(row.difference, row.difference_se) + ", dropped" * row.dropped,
            "" if row.certainty is None else f"{row.certainty:.3f}",
            "" if row.p_value is None else f"{row.p_value:.2g}",
        )
        for row in found.candidates
    ]


# The text --------------------------------------------------------------------------------


def overlap_warnings(overlap: Mapping[str, float]) -> list[str]:
    """That a split's text stands in others too, where there is more of it than comes by chance."""
    much = [f"{s:.0%} of the {name} text" for name, s in overlap.items() if s >= MUCH_SHARED]
    if not much:
        return []
    return [
        f"{' and '.join(much)} stands in another split too, so that figures on it are too good; "
        "give text that does not repeat itself"
    ]


def part_warnings(evaluation: EvaluationFile) -> list[str]:
    """Which parts of a mixture the final model is much worse on than on all of it, beyond noise."""
    whole, last = evaluation.kl, evaluation.last or "cut"
    return [
        f"on {name} the {last} model's KL is {plus_minus(part.kl, part.kl_se)}, more than "
        f"{MUCH_WORSE:g} times the {whole:.4f} of all text: where that text matters, give it more "
        "weight in --calibration, or remove fewer blocks"
        for name, part in evaluation.parts.items()
        if part.kl - 2 * (part.kl_se or 0.0) > MUCH_WORSE * whole
    ]


# The patch and the healing ---------------------------------------------------------------


def patch_warnings(found: CutRecord | CardParts | EvaluationFile | HealingFile) -> list[str]:
    """Which cuts were not patched, and why, and that a patch did not help where it did not.

    One line where the reason is the same for all cuts.
    """
    patch = getattr(found, "patch", None)
    cuts = [*getattr(found, "unpatched", ()), *(patch.unpatched if patch is not None else ())]
    reasons = dict.fromkeys(cut.reason for cut in cuts)
    if len(reasons) == 1 and not (patch is not None and patch.cuts):
        return [f"not patched: {next(iter(reasons))}"]
    said = []
    if isinstance(found, EvaluationFile) and found.last == "patched":
        exact = found.cut
        if exact is not None and found.kl > exact.kl:
            said.append(
                f"the patch did not help: on unseen text the KL is {found.kl:.4f} with it and "
                f"{exact.kl:.4f} without; give it more --patch-tokens or other text, or take "
                "the exact cut (--patch none)"
            )
    return said + [
        f"not patched at blocks {cut.removed[0]} to {cut.removed[-1]}: {cut.reason}" for cut in cuts
    ]


def was_tuned(patch: PatchRecord) -> bool:
    """Whether layers beside the cuts have other weights than the fit gave."""
    held_out = patch.tuning.held_out_kl if patch.tuning is not None else []
    return bool(held_out) and min(held_out) < held_out[0]


# The spectrum ----------------------------------------------------------------------------


def state_map(removed: Sequence[int], n: int) -> str:
    """A state as one character a block: # stays, · is removed."""
    return "".join("·" if i in removed else "#" for i in range(n))


def spectrum_map(
    spectrum: SpectrumFile, candidates: CandidatesFile | None, removed: Sequence[int] | None
) -> list[str]:
    """The spectrum as monospaced lines: rank, energy, measured KL, one column per block."""
    n = spectrum.n
    rows = () if candidates is None else candidates.candidates
    measured = {tuple(row.removed): kl_of(row).text() for row in rows}
    tens = "".join(str(i // 10) if i % 10 == 0 else " " for i in range(n)).rstrip()
    lines = [("", "", "", tens), ("rank", "energy", "KL", "".join(str(i % 10) for i in range(n)))]
    for state in spectrum.states:
        mark = "*" if removed is not None and sorted(state.removed) == sorted(removed) else " "
        kl = measured.get(tuple(state.removed), "")
        row = (f"{mark}{state.rank}", f"{state.energy:.4g}", kl, state_map(state.removed, n))
        lines.append(row)
    wide = [max(len(line[k]) for line in lines) for k in range(3)]
    return ["  ".join([*map(str.rjust, line[:3], wide), line[3]]) for line in lines]
