"""Texts of the studies: for the choice of blocks, for healing, and for evaluation.

No evaluation text is used to choose, fit or train. Of the conversations the last 300 are for
evaluation and the first 700 are not. Of the files of Python's library, in the order of seed 0, the
first 400 are not.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from isingcut.data import corpora, healing_text
from isingcut.data.calibration import TextSampler, build
from isingcut.data.tokens import TokenSet
from isingcut.files.writing import atomic_file

JUDGED_CONVERSATIONS = 300
TRAINED_FILES = 400
FILES = {"wikitext2": "wikitext2/test_raw.jsonl", "c4": "calib_text/c4_300.jsonl"}
CONVERSATION = 170
"""Mean tokens of a conversation, to convert a number of tokens to a number of samples."""


class Texts:
    """Token samples of named texts.

    Args:
        data: folder of the data files.
        work: work folder, where texts derived from them are kept.
        length: tokens of a sample; conversations are truncated at twice as many.
    """

    def __init__(self, data: Path, work: Path, tokenizer: Any, length: int) -> None:
        self.data = data
        self.work = work
        self.tokenizer = tokenizer
        self.length = length

    def samples(self, source: str, tokens: int, *, chat: bool = False) -> TokenSet:
        """Return about ``tokens`` tokens of a source, named as in ``--calibration``."""
        each = min(CONVERSATION, self.length) if chat else self.length
        length = self.length * (1 + chat)
        # One sample for each part of a mixture.
        few = 1 + source.count(",")
        sampler = TextSampler(self.tokenizer, length, 0)
        rest = {"rank_samples": few, "report_samples": few}
        samples = max(2, tokens // each)
        return build(source, sampler, samples=samples, **rest).splits["energy"]

    def judged(self, name: str, tokens: int) -> TokenSet:
        """Return about ``tokens`` tokens of an evaluation text."""
        if name in FILES:
            source = str(self.data / FILES[name])
        elif name == "instruct":
            source = self.write(
                "instruct", self._conversations()[-JUDGED_CONVERSATIONS:]
            )
        else:
            source = self.write("code", self._files(TRAINED_FILES, None))
        return self.samples(source, tokens, chat=name == "instruct")

    def problems(self) -> str:
        """Return the path of a file of word problems with their solutions."""
        records = self.records("gsm8k/train1000")
        texts = (f"Question: {r['context']}\nAnswer: {r['solution']}" for r in records)
        return self.write("gsm8k-train1000", ({"text": text} for text in texts))

    def conversations(self) -> str:
        """Return the path of a file of the conversations that are not for evaluation."""
        return self.write("chosen", self._conversations()[:-JUDGED_CONVERSATIONS])

    def trained_code(self) -> str:
        """Return the path of a file of the Python files that are not for evaluation."""
        return self.write("trained-code", self._files(0, TRAINED_FILES))

    def halves(self, file: str) -> tuple[str, str]:
        """Return the paths of two files: first and second half of a data file's documents."""
        records = self.records(file)
        name = Path(file).name
        middle = len(records) // 2
        first = self.write(f"{name}-first", records[:middle])
        return first, self.write(f"{name}-second", records[middle:])

    def training(
        self, samples: int, report_samples: int, seed: int
    ) -> healing_text.HealingText:
        """Return the healing text: 50 % Wikipedia leads, 30 % conversations, 20 % code."""
        return healing_text.build(
            f"wiki=0.5,{self.conversations()}=0.3,{self.trained_code()}=0.2",
            TextSampler(self.tokenizer, self.length, seed),
            samples=samples,
            report_samples=report_samples,
        )

    def _conversations(self) -> list[dict[str, Any]]:
        """Return the conversations, as plain texts if the tokenizer has no chat template."""
        chats = self.records("calib_instruct/mix1000")
        if self.tokenizer.chat_template:
            return chats
        return [
            {"text": "\n\n".join(m["content"] for m in c["messages"])} for c in chats
        ]

    def _files(self, start: int, stop: int | None) -> Iterable[dict[str, Any]]:
        files = corpora.read("python", self.tokenizer, 0).documents
        return ({"text": text} for text in itertools.islice(files, start, stop))

    def records(self, file: str) -> list[dict[str, Any]]:
        """Return the records of a data file."""
        lines = (self.data / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def write(self, name: str, records: Iterable[dict[str, Any]]) -> str:
        """Write records to a file of the work folder unless it exists; return its path."""
        path = self.work / "text" / f"{name}.jsonl"
        if not path.exists():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            with atomic_file(path) as temporary:
                temporary.write_text(lines, encoding="utf-8")
        return str(path)
