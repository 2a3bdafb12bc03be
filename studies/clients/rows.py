"""Rows of the study of clients: one client and one model each, their comparison, table, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CONTROL = "other blocks"
FAILURES = ("differs", "failed")


@dataclass(frozen=True)
class Answer:
    """One prompt: the first token that is not the reference's, and how far below it it is liked.

    Args:
        at: number of that token, or None where all are the reference's.
        gap: the reference's highest logit there, less its logit of the other token.
    """

    at: int | None = None
    gap: float = 0.0


@dataclass(frozen=True)
class Row:
    """What became of one client and one model.

    Args:
        model: its name.
        client: the client's, with the kind of file where it reads several.
        version: the client's.
        tie: the largest gap of a near-tie.
        answers: by prompt; empty where there are none.
        refused: why there is no file for the client.
        error: why the client gave no tokens.
        original: the outcome with the uncut original, where the client fails.
    """

    model: str
    client: str
    version: str = ""
    tie: float = 0.0
    answers: tuple[Answer, ...] = ()
    refused: str = ""
    error: str = ""
    original: str = ""

    @property
    def counts(self) -> tuple[int, int, int]:
        """Prompts that are the same, that part at a near-tie, and that are others."""
        gaps = [a.gap for a in self.answers if a.at is not None]
        ties = sum(gap <= self.tie for gap in gaps)
        return len(self.answers) - len(gaps), ties, len(gaps) - ties

    @property
    def outcome(self) -> str:
        """``agrees``, ``near-ties``, ``differs``, ``refused`` or ``failed``."""
        if self.refused:
            return "refused"
        if self.error or not self.answers:
            return "failed"
        _, ties, others = self.counts
        return "differs" if others else "near-ties" if ties else "agrees"


def compare(
    liked: Sequence[Sequence[dict[str, float]]], tokens: Sequence[Sequence[int]]
) -> tuple[Answer, ...]:
    """Where each prompt's tokens leave the reference.

    Args:
        liked: of each prompt and step, the reference's highest logits by token id, highest first.
        tokens: the client's, as many.
    """
    answers = []
    for steps, got in zip(liked, tokens, strict=True):
        answer = Answer()
        for at, (logits, token) in enumerate(zip(steps, got, strict=True)):
            best = next(iter(logits))
            if str(token) != best:
                answer = Answer(at, logits[best] - logits.get(str(token), float("-inf")))
                break
        answers.append(answer)
    return tuple(answers)


def table(rows: Sequence[Row]) -> list[str]:
    """A line for each row; below it why there is no answer, or where prompts part."""
    form = "{:<16}{:<22}{:<9}{:>5}{:>6}{:>7}  {}"
    lines = [form.format("model", "client", "version", "same", "ties", "others", "outcome")]
    for row in rows:
        cells = row.counts if row.answers else ("", "", "")
        told = row.outcome + (f"; the uncut original {row.original}" if row.original else "")
        lines.append(form.format(row.model, row.client, row.version, *cells, told))
        if row.refused or row.error:
            lines.append(f"    {row.refused or row.error}")
        if row.client != CONTROL:
            lines += [
                f"    prompt {i}, token {a.at}: {a.gap:.2g} below the reference's highest logit"
                for i, a in enumerate(row.answers)
                if a.at is not None
            ]
    return lines


def figures(rows: Sequence[Row]) -> dict[str, int]:
    """The figures by name; controls are counted apart."""
    clients = [r for r in rows if r.client != CONTROL]
    outcomes = [r.outcome for r in clients]
    failed = [r for r in clients if r.outcome in FAILURES]
    return {
        "clients_agree": outcomes.count("agrees"),
        "clients_near_ties": outcomes.count("near-ties"),
        "clients_refused": outcomes.count("refused"),
        "clients_failed": len(failed),
        "clients_failed_uncut": sum(r.original in FAILURES for r in failed),
        "controls_noticed": sum(r.client == CONTROL and r.outcome == "differs" for r in rows),
    }
