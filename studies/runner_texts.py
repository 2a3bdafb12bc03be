"""Texts of the studies: what blocks are chosen on, what is healed with, and what judges.

Nothing that judges is chosen, fitted or trained on: of conversations the last 300 judge and the
first 700 do not; of the files of Python's library, in the order of seed 0, the first 400 do not.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from isingcut.data import corpora, healing_text
from isingcut.data.calibration import build
from isingcut.data.tokens import TokenSet
from isingcut.files.writing import atomic_file

JUDGED_CONVERSATIONS = 300
TRAINED_FILES = 400
FILES = {
    "wikitext2": "wikitext2/test_raw.jsonl",
    "c4": "calib_text/c4_300.jsonl",
    "web": "calib_text/c4_300.jsonl",
    "wiki": "calib_text/wiki_demo.jsonl",
    "stories": "calib_text/tinystories.jsonl",
}
CONVERSATION = 170
"""Tokens of a mean conversation, for the number of samples that hold so many tokens."""


class Texts:
    """Token samples by the name of a text.

    Args:
        data: the folder of the data files.
        work: texts that are made of them are kept there.
        length: tokens of a sample; conversations are cut at twice as many.
    """

    def __init__(self, data: Path, work: Path, tokenizer: Any, length: int) -> None:
        self.data, self.work, self.tokenizer, self.length = data, work, tokenizer, length

    def samples(self, source: str, tokens: int, *, chat: bool = False) -> TokenSet:
        """About so many tokens of a source that a calibration takes."""
        each = min(CONVERSATION, self.length) if chat else self.length
        length = self.length * (1 + chat)
        # As many as a mixture has parts.
        few = 1 + source.count(",")
        rest = {"rank_samples": few, "report_samples": few, "length": length, "seed": 0}
        samples = max(2, tokens // each)
        return build(source, self.tokenizer, samples=samples, **rest).splits["energy"]

    def judged(self, name: str, tokens: int) -> TokenSet:
        """About so many tokens of a text that judges."""
        return self.samples(self.source(name), tokens, chat=name in ("instruct", "answers"))

    def source(self, name: str) -> str:
        """Where a text that judges is from."""
        if name in FILES:
            return str(self.data / FILES[name])
        if name in ("instruct", "answers"):
            path = self._write("instruct", self._conversations()[-JUDGED_CONVERSATIONS:])
            return path if name == "instruct" else f"answers:{path}"
        if name in ("code", "python"):
            return self._write("code", self._files(TRAINED_FILES, None))
        if name == "maths":
            return self._problems("gsm8k/train1000", "solution", 1)
        return self._problems("arc_challenge/dev", "choices", 8)

    def conversations(self) -> str:
        """A file of the conversations that do not judge."""
        return self._write("chosen", self._conversations()[:-JUDGED_CONVERSATIONS])

    def trained_code(self) -> str:
        """A file of Python files that do not judge."""
        return self._write("trained-code", self._files(0, TRAINED_FILES))

    def halves(self, file: str) -> tuple[str, str]:
        """Two files, of the first and the second half of a data file's documents."""
        records, name = self._records(file), Path(file).name
        middle = len(records) // 2
        parts = {f"{name}-first": records[:middle], f"{name}-second": records[middle:]}
        first, second = (self._write(*item) for item in parts.items())
        return first, second

    def training(self, samples: int, report_samples: int, seed: int) -> healing_text.HealingText:
        """Half Wikipedia leads, three tenths conversations, the rest code."""
        return healing_text.build(
            f"wiki=0.5,{self.conversations()}=0.3,{self.trained_code()}=0.2",
            self.tokenizer,
            samples=samples,
            report_samples=report_samples,
            length=self.length,
            seed=seed,
        )

    def _conversations(self) -> list[dict[str, Any]]:
        """Chats; texts for a model without a chat template."""
        chats = self._records("calib_instruct/mix1000")
        if self.tokenizer.chat_template:
            return chats
        return [{"text": "\n\n".join(m["content"] for m in c["messages"])} for c in chats]

    def _files(self, start: int, stop: int | None) -> Iterable[dict[str, Any]]:
        files = corpora.read("python", self.tokenizer, 0).documents
        return ({"text": text} for text in itertools.islice(files, start, stop))

    def _problems(self, file: str, answer: str, together: int) -> str:
        """Questions with their right answers as running text, some to a document."""
        texts = [
            f"Question: {r['context']}\nAnswer: "
            + (r["choices"][r["answer"]] if answer == "choices" else r[answer])
            for r in self._records(file)
        ]
        groups = [texts[i : i + together] for i in range(0, len(texts), together)]
        return self._write(file.replace("/", "-"), ({"text": "\n".join(g)} for g in groups))

    def _records(self, file: str) -> list[dict[str, Any]]:
        lines = (self.data / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _write(self, name: str, records: Iterable[dict[str, Any]]) -> str:
        path = self.work / "text" / f"{name}.jsonl"
        if not path.exists():
            lines = "".join(json.dumps(record) + "\n" for record in records)
            with atomic_file(path) as temporary:
                temporary.write_text(lines, encoding="utf-8")
        return str(path)
