"""Rows of the study of clients, one per client and model: comparison, table and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CONTROL = "other blocks"
FAILURES = ("differs", "failed")


@dataclass(frozen=True)
class Answer:
    """First difference between a client's answer to one prompt and the reference.

    Args:
        at: index of the first different token, or None if all are the reference's.
        gap: the reference's highest logit at that step, minus its logit of the client's token.
    """

    at: int | None = None
    gap: float = 0.0


@dataclass(frozen=True)
class Row:
    """Result of one client with one model.

    Args:
        model: name of the model.
        client: name of the client, with the kind of file if it reads several.
        version: version of the client.
        tie: largest gap of a near-tie.
        answers: answers by prompt; empty if the client gave none.
        refused: reason why there is no file for the client.
        error: reason why the client gave no tokens.
        original: outcome with the uncut original, if the client fails.
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
        """Numbers of prompts that are the same, near-ties, and different."""
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
    """Find the first difference from the reference in each prompt's tokens.

    Args:
        liked: the reference's highest logits by token id, highest first, per prompt and step.
        tokens: the client's tokens, as many.
    """
    answers = []
    for steps, got in zip(liked, tokens, strict=True):
        answer = Answer()
        for at, (logits, token) in enumerate(zip(steps, got, strict=True)):
            best = next(iter(logits))
            if str(token) != best:
                answer = Answer(
                    at, logits[best] - logits.get(str(token), float("-inf"))
                )
                break
        answers.append(answer)
    return tuple(answers)


def table(rows: Sequence[Row]) -> list[str]:
    """Return a line for each row, followed by its error or its prompts' first differences."""
    form = "{:<16}{:<22}{:<9}{:>5}{:>6}{:>7}  {}"
    lines = [
        form.format("model", "client", "version", "same", "ties", "others", "outcome")
    ]
    for row in rows:
        cells = row.counts if row.answers else ("", "", "")
        told = row.outcome + (
            f"; the uncut original {row.original}" if row.original else ""
        )
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
    """Return the figures by name; controls are counted separately."""
    clients = [r for r in rows if r.client != CONTROL]
    outcomes = [r.outcome for r in clients]
    failed = [r for r in clients if r.outcome in FAILURES]
    return {
        "clients_agree": outcomes.count("agrees"),
        "clients_near_ties": outcomes.count("near-ties"),
        "clients_refused": outcomes.count("refused"),
        "clients_failed": len(failed),
        "clients_failed_uncut": sum(r.original in FAILURES for r in failed),
        "controls_noticed": sum(
            r.client == CONTROL and r.outcome == "differs" for r in rows
        ),
    }
