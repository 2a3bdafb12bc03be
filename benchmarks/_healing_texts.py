"""Texts of the healing benchmark: what is trained on, and what is judged on and nothing else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from isingcut.data import corpora, healing_text
from isingcut.data.calibration import build
from isingcut.data.tokens import TokenSet

TRAINED_CONVERSATIONS = 700
JUDGED_CONVERSATIONS = 300
TRAINED_FILES = 400
"""Files of Python's library, in the order of seed 0; later ones are judged."""


class Remembered:
    """A model whose logits are kept, for texts that it is asked about again and again.

    12,288 tokens of SmolLM2 take 2.4 GB in float32.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, model.device
        self.kept: dict[bytes, Any] = {}

    def __call__(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        asked = input_ids.cpu().numpy().tobytes()
        if asked not in self.kept:
            self.kept[asked] = self.model(input_ids=input_ids, use_cache=use_cache)
        return self.kept[asked]


def mixed_text(
    data: Path,
    tokenizer: Any,
    folder: Path,
    *,
    samples: int,
    report_samples: int,
    length: int,
    seed: int,
) -> healing_text.HealingText:
    """Half Wikipedia leads, three tenths conversations through the chat template, the rest code.

    Args:
        data: folder with `calib_instruct/mix1000.jsonl`.
        folder: the texts are kept there, so that a distillation that goes on has the same.
        samples, length: of the samples trained on.
        report_samples: of other documents.
    """
    paths = [folder / "conversations.jsonl", folder / "code.jsonl"]
    if not paths[1].exists():
        files = itertools.islice(corpora.read("python", tokenizer, 0).documents, TRAINED_FILES)
        for path, texts in zip(paths, (_chats(data, tokenizer), files), strict=True):
            _write(path, texts)
    return healing_text.build(
        f"wiki=0.5,{paths[0]}=0.3,{paths[1]}=0.2",
        tokenizer,
        samples=samples,
        report_samples=report_samples,
        length=length,
        seed=seed,
    )


def training_text(
    data: Path, tokenizer: Any, path: Path, *, samples: int, length: int, seed: int
) -> healing_text.HealingText:
    """Conversations through the chat template, and Wikipedia leads, shuffled.

    Args:
        data: folder with `calib_instruct/mix1000.jsonl`.
        path: the text is kept there, so that a distillation that goes on has the same.
        samples, length: of the samples trained on.
    """
    if not path.exists():
        leads = itertools.islice(corpora.read("wiki", tokenizer, seed).documents, 4000)
        _write(path, [*_chats(data, tokenizer), *leads])
    return healing_text.build(
        str(path), tokenizer, samples=samples, report_samples=4, length=length, seed=seed
    )


def judged_texts(
    data: Path, tokenizer: Any, tokens: int, *, code: bool = False, maths: bool = False
) -> dict[str, TokenSet]:
    """Text that nothing was chosen, fitted or trained on, about so many tokens of each.

    Args:
        code: 256 tokens from within each of the Python files that `mixed_text` leaves, too.
        maths: word problems with their worked answers, as running text, too.
    """
    found = {}
    files = {"wikitext2": "wikitext2/test_raw.jsonl", "c4": "calib_text/c4_300.jsonl"}
    for name, file in files.items():
        found[name] = _running(str(data / file), tokenizer, tokens)
    rows: list[list[int]] = []
    for record in _conversations(data)[-JUDGED_CONVERSATIONS:]:
        text = str(tokenizer.apply_chat_template(record["messages"], tokenize=False))
        rows.append(tokenizer(text, add_special_tokens=False)["input_ids"][:512])
        if len(rows) > 1 and sum(map(len, rows)) >= tokens:
            break
    found["instruct"] = TokenSet.from_rows(rows)
    if code:
        files = itertools.islice(
            corpora.read("python", tokenizer, 0).documents, TRAINED_FILES, None
        )
        ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in files)
        long = (row[256:512] for row in ids if len(row) >= 512)
        found["code"] = TokenSet.from_rows(list(itertools.islice(long, max(2, tokens // 256))))
    if maths:
        found["maths"] = _word_problems(data, tokenizer, tokens)
    return found


def _running(source: str, tokenizer: Any, tokens: int) -> TokenSet:
    """Samples of 256 tokens of plain text."""
    found = build(
        source,
        tokenizer,
        samples=max(2, tokens // 256),
        rank_samples=1,
        report_samples=1,
        length=256,
        seed=0,
    )
    return found.splits["energy"]


def _word_problems(data: Path, tokenizer: Any, tokens: int) -> TokenSet:
    """Problems with worked answers one after the other, in samples of 256 tokens."""
    ids: list[int] = []
    for line in (data / "gsm8k" / "train1000.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        text = f"Question: {record['context']}\nAnswer: {record['solution']}\n\n"
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    count = min(max(2, tokens // 256), len(ids) // 256)
    return TokenSet(
        torch.tensor(ids[: 256 * count]).view(count, 256),
        torch.ones(count, 256, dtype=torch.bool),
        torch.arange(count),
    )


def _chats(data: Path, tokenizer: Any) -> list[str]:
    """Conversations to train on, as the model reads them."""
    rows = _conversations(data)[:TRAINED_CONVERSATIONS]
    return [str(tokenizer.apply_chat_template(r["messages"], tokenize=False)) for r in rows]


def _write(path: Path, texts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_text(content, encoding="utf-8")


def _conversations(data: Path) -> list[dict[str, Any]]:
    lines = (data / "calib_instruct" / "mix1000.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in lines.splitlines()]
