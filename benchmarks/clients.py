"""Cut checkpoints in the programs people run them with: transformers, vLLM and llama.cpp.

    python benchmarks/clients.py [--only llama,smollm2] [--clients transformers,vllm,llama.cpp]

Tiny random models of several families and SmolLM2-135M-Instruct lose some blocks (`isingcut
excise`). Each client, a process of its own in an environment of its own, loads what was written and
continues every prompt greedily, in float32. The reference is the original in transformers
with the same blocks skipped and no cache. llama.cpp reads two files: the original's GGUF
with its blocks cut out (`excise --gguf`), and the cut checkpoint converted by llama.cpp's script.

A prompt counts as the same only where all tokens are. Where the first other token is
one that the reference likes almost as well (its logit at most `--tie` below the highest) it is a
near-tie, shown apart: programs add in different orders, and what follows has another context.
SmolLM2's GGUF holds packed weights, which llama.cpp multiplies with activations rounded to 8 bits:
`--packed-tie` for that row. The row `other blocks` is the original without other blocks
than those removed: the comparison must notice it. Where a client fails, it is also given the uncut
original, and judged by that: what fails there, too, is not the cut's doing.

Environments (`--envs`) are made with pip where they are missing: vLLM from its CPU wheel,
llama.cpp compiled (a C++ compiler and about ten minutes). What was made and answered stays in
`--work` and is not made again; remove the folder to begin anew. Ends with

clients_agree  rows where every prompt has the reference's tokens
clients_near_ties  rows where all other tokens are near-ties
clients_refused  rows without a file, because isingcut says that it cannot be
clients_failed  rows where the client does not load the file (or its converter the checkpoint), or
  computes something else
clients_failed_uncut  of these, rows where the client fails with the uncut original, too
controls_noticed  models whose row `other blocks` is no agreement
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from _clients_asking import WORKER, Liked, ask, digest, greedy, kept
from _clients_environments import Unavailable, converter, llama_python, vllm_python
from _clients_models import SUBJECTS, Made, Subject, prepare
from _clients_rows import CONTROL, FAILURES, Row, compare, figures, table
from isingcut.models.sources import resolve

RESULTS = Path(__file__).with_name("results") / "clients.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isingcut-clients"
# Row, client, which of the files it is given, and which file holds the same uncut.
ROWS = (
    ("transformers", "transformers", "checkpoint", "source"),
    ("vllm", "vllm", "checkpoint", "source"),
    ("llama.cpp, cut GGUF", "llama.cpp", "gguf", "original"),
    ("llama.cpp, converted", "llama.cpp", "converted", "original"),
)
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was",
    "Water boils at",
    "The most important thing about science is",
    "In the year 1969,",
    "My favourite food is",
    "def add(a, b):\n    return",
    "The river rises in the hills above the town, runs past the old mill and under three bridges, "
    "and reaches the sea after forty miles. Those who live on its banks say that it",
)


class Asked:
    """One model's clients, asked one after the other.

    Args:
        subject: the model.
        made: its files.
        pythons: by client, or why there is none.
        options: the command's.
    """

    def __init__(
        self,
        subject: Subject,
        made: dict[str, Made],
        pythons: dict[str, Path | str],
        options: Any,
    ) -> None:
        self.subject, self.made, self.pythons, self.options = subject, made, pythons, options
        self.answers = options.work / subject.name / "answers"

    def rows(self) -> Iterator[Row]:
        """Those of the clients, then the control."""
        cut, other = self.subject.removed, self.subject.others
        for name, client, file, original in ROWS:
            if client not in self.options.clients:
                continue
            row = self.row(name, client, file, cut)
            if row.outcome in FAILURES:
                row = replace(row, original=self.row(name, client, original, ()).outcome)
            yield row
        tokens = [[int(next(iter(step))) for step in steps] for steps in self.reference(other)]
        answers = compare(self.reference(cut), tokens)
        yield Row(self.subject.name, CONTROL, tie=self.options.tie, answers=answers)

    def row(self, name: str, client: str, file: str, removed: tuple[int, ...]) -> Row:
        """One client's answer for one file, beside the reference without the blocks ``removed``."""
        made, python = self.made[file], self.pythons[client]
        packed = self.subject.packed and file in ("gguf", "original")
        tie = self.options.packed_tie if packed else self.options.tie
        row = Row(self.subject.name, name, tie=tie)
        if made.path is None:
            return replace(row, refused=made.refused, error=made.error)
        if isinstance(python, str):
            return replace(row, error=python)
        asked = {"prompts": self.options.ids, "new_tokens": self.options.new_tokens}
        answer = kept(
            self.answers / f"{client} {file}.json",
            [digest(made.path), digest(WORKER), str(python), asked],
            lambda: ask(client, python, {"model": str(made.path), **asked}, self.options.seconds),
        )
        row = replace(row, version=next(iter(answer["versions"].values()), ""))
        if "error" in answer:
            return replace(row, error=answer["error"])
        return replace(row, answers=compare(self.reference(removed), answer["tokens"]))

    def reference(self, removed: tuple[int, ...]) -> Liked:
        """The original's in transformers without the blocks ``removed``."""
        source, asked = self.made["source"].path, (self.options.ids, self.options.new_tokens)
        name = "reference " + (" ".join(map(str, removed)) or "uncut")
        return kept(
            self.answers / f"{name}.json",
            [digest(source), *asked],
            lambda: {"liked": greedy(source, removed, *asked)},
        )["liked"]


def python_of(make: Callable[[Path], Path], given: Path | None, home: Path) -> Path | str:
    """A client's Python or llama.cpp's converter, or why there is none."""
    try:
        return given or make(home)
    except Unavailable as error:
        return str(error)


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads a list of names, all of them known."""

    def read(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected {', '.join(known)}; got {name!r}")
        return found

    return read


def main() -> None:
    """Make, ask, compare; print the table and the figures."""
    subjects, clients = [s.name for s in SUBJECTS], list(dict.fromkeys(c for _, c, _, _ in ROWS))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", type=names(subjects), default=subjects, help=f"of {', '.join(subjects)}")
    add("--clients", type=names(clients), default=clients, help=f"of {', '.join(clients)}")
    add("--new-tokens", type=int, default=16)
    add("--tie", type=float, default=0.001)
    add("--packed-tie", type=float, default=0.5)
    add("--envs", type=Path, default=CACHE, help="where environments are, or are made")
    add("--vllm-python", type=Path, help="the Python of an environment that has vLLM")
    add("--llama-python", type=Path, help="of one that has llama-cpp-python")
    add("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    add("--work", type=Path, default=CACHE / "work")
    add("--seconds", type=float, default=600, help="for one client's answer")
    add("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2"))
    options.ids = [tokenizer(p, add_special_tokens=False).input_ids for p in PROMPTS]
    pythons: dict[str, Path | str] = {"transformers": Path(sys.executable)}
    if "vllm" in options.clients:
        pythons["vllm"] = python_of(vllm_python, options.vllm_python, options.envs)
    script: Path | str = "llama.cpp is not asked"
    if "llama.cpp" in options.clients:
        pythons["llama.cpp"] = python_of(llama_python, options.llama_python, options.envs)
        script = python_of(converter, options.converter, options.envs)
    rows: list[Row] = []
    for subject in SUBJECTS:
        if subject.name not in options.only:
            continue
        made = prepare(subject, options.work / subject.name, script)
        for row in Asked(subject, made, pythons, options).rows():
            rows.append(row)
            print(f"{row.model}: {row.client}: {row.outcome}", flush=True)
    print("\n" + "\n".join(table(rows)) + "\n")
    found = figures(rows)
    if options.only == subjects and options.clients == clients:
        content = {"figures": found, "rows": [{**asdict(r), "outcome": r.outcome} for r in rows]}
        options.results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, value in found.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
