"""Check cut checkpoints in the programs that run them: transformers, vLLM and llama.cpp.

Some blocks are removed from tiny random models of several families and SmolLM2-135M-Instruct
(`isingcut excise`). Each client, in a separate process and environment, loads the written files and
continues every prompt greedily, in float32. The reference is the original in transformers
with the same blocks skipped and no cache. llama.cpp reads two files: the original's GGUF
with its blocks cut out (`excise --gguf`), and the cut checkpoint converted by llama.cpp's script.

A prompt counts as the same only if all tokens are. If the reference's logit of the first other
token is at most 0.001 below its highest, the prompt is a near-tie, which is counted separately:
programs add in different orders, and later tokens have another context.
SmolLM2's GGUF holds packed weights, which llama.cpp multiplies with activations rounded to 8 bits:
the limit is 0.5 for that row. The row `other blocks` is a control: the original without other
blocks than those removed; the comparison must notice it. A client that fails is also given the
uncut original: if that fails too, the cut is not the cause.

`bash studies/clients/environments.sh FOLDER` makes the clients' environments; those that exist in
`--envs FOLDER` are compared. Figures:

clients_agree  rows in which every prompt has the reference's tokens
clients_near_ties  rows in which all differences are near-ties
clients_refused  rows without a file, because isingcut refused to write it
clients_failed  rows in which the client does not load the file (or its converter the checkpoint),
  or computes something else
clients_failed_uncut  of these, rows in which the client also fails with the uncut original
controls_noticed  models whose row `other blocks` differs beyond near-ties
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from isingcut.formats.architectures.blocks import skip_blocks, stop_rescaling
from isingcut.formats.libraries import quiet_transformers
from isingcut.formats.sources import PACKAGED, resolve
from studies.clients.models import SUBJECTS, Subject, make_files
from studies.clients.rows import CONTROL, FAILURES, Answer, Row, compare, figures, table
from studies.runner import Content, Part, Study, read, write

WORKER = Path(__file__).with_name("worker.py")
KEPT = 50
"""Number of highest logits kept at each step."""
TIE = 0.001
PACKED_TIE = 0.5
"""Largest gaps of near-ties, in general and for packed weights."""
ROWS = (
    ("transformers", "transformers", "checkpoint", "source"),
    ("vllm", "vllm", "checkpoint", "source"),
    ("llama.cpp, cut GGUF", "llama", "gguf", "original"),
    ("llama.cpp, converted", "llama", "converted", "original"),
)
"""Name of the row, client, its cut file, and the same file uncut."""
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


class Clients(Study):
    """Study of every model in every client."""

    name = "clients"
    settings = ("new_tokens",)

    @classmethod
    def add_options(cls, add: Callable[..., Any]) -> None:
        names = [s.name for s in SUBJECTS]
        add("--models", nargs="+", default=names, choices=names)
        add(
            "--envs", type=Path, default=Path("clients-envs"), help="of environments.sh"
        )
        add("--new-tokens", type=int, default=16)
        add(
            "--seconds",
            type=float,
            default=600,
            dest="limit",
            help="for one client's answer",
        )

    @cached_property
    def prompts(self) -> list[list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(resolve(PACKAGED))
        return [tokenizer(p, add_special_tokens=False).input_ids for p in PROMPTS]

    def python(self, client: str) -> Path:
        """Return the path of a client's Python."""
        if client == "transformers":
            return Path(sys.executable)
        return Path(self.options.envs, client, "bin/python")

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        return [row for row in ROWS if self.python(row[1]).exists()]

    def parts(self) -> list[Part]:
        found = []
        for subject in (s for s in SUBJECTS if s.name in self.options.models):
            found.append(
                Part(f"files/{subject.name}", lambda _, s=subject: self._files(s))
            )
            if not self.done(f"files/{subject.name}"):
                continue
            found += [
                self._reference(subject, blocks)
                for blocks in (subject.removed, subject.others, ())
            ]
            for name, client, file, original in self.rows:
                answer = self._answer(subject, client, file)
                found.append(answer)
                cut = self._reference(subject, subject.removed).name
                if self.done(answer.name) and self.done(cut):
                    row = self._row(subject, name, client, file, subject.removed)
                    failed = row.outcome in FAILURES
                    found += [self._answer(subject, client, original)] if failed else []
        return found

    def _files(self, subject: Subject) -> Content:
        converter = self.options.envs / "converter" / "convert_hf_to_gguf.py"
        folder = self.work.absolute() / "models" / subject.name
        return make_files(subject, folder, converter.absolute())

    def _reference(self, subject: Subject, blocks: Sequence[int]) -> Part:
        def make(_: Path) -> Content:
            source = self.read(f"files/{subject.name}")["source"]["path"]
            return {
                "liked": greedy(source, blocks, self.prompts, self.options.new_tokens)
            }

        return Part(
            f"reference/{subject.name}/{'-'.join(map(str, blocks)) or 'uncut'}", make
        )

    def _answer(self, subject: Subject, client: str, file: str) -> Part:
        def make(_: Path) -> Content:
            made = self.read(f"files/{subject.name}")[file]
            if "path" not in made:
                return made
            o = self.options
            job = {
                "model": made["path"],
                "prompts": self.prompts,
                "new_tokens": o.new_tokens,
            }
            return ask(client, self.python(client), job, o.limit)

        return Part(f"answers/{subject.name}/{client}-{file}", make)

    def _row(
        self, subject: Subject, name: str, client: str, file: str, cut: Any
    ) -> Row:
        """Compare a client's answer for one file with the reference without the blocks ``cut``."""
        answer = self.read(self._answer(subject, client, file).name)
        packed = subject.packed and file in ("gguf", "original")
        version = next(iter(answer.get("versions", {}).values()), "")
        row = Row(subject.name, name, version, PACKED_TIE if packed else TIE)
        if "tokens" in answer:
            liked = self.read(self._reference(subject, cut).name)["liked"]
            return replace(row, answers=compare(liked, answer["tokens"]))
        return replace(
            row, refused=answer.get("refused", ""), error=answer.get("error", "")
        )

    def _rows(self) -> Iterator[Row]:
        for subject in (s for s in SUBJECTS if self.done(f"files/{s.name}")):
            for name, client, file, original in self.rows:
                row = self._row(subject, name, client, file, subject.removed)
                if row.outcome in FAILURES:
                    uncut = self._row(subject, name, client, original, ())
                    row = replace(row, original=uncut.outcome)
                yield row
            cut, other = (
                self.read(self._reference(subject, blocks).name)["liked"]
                for blocks in (subject.removed, subject.others)
            )
            tokens = [[int(next(iter(step))) for step in steps] for steps in other]
            yield Row(subject.name, CONTROL, tie=TIE, answers=compare(cut, tokens))

    def collect(self) -> Content:
        return {
            "rows": [{**asdict(row), "outcome": row.outcome} for row in self._rows()]
        }

    @staticmethod
    def show(content: Content) -> dict[str, Any]:
        rows = []
        for found in content["rows"]:
            given = {k: v for k, v in found.items() if k not in ("outcome", "answers")}
            rows.append(
                Row(**given, answers=tuple(Answer(**a) for a in found["answers"]))
            )
        print("\n".join(table(rows)) + "\n")
        return figures(rows)


def greedy(
    source: str, removed: Sequence[int], prompts: Sequence[list[int]], new_tokens: int
) -> list[list[dict[str, float]]]:
    """Return the original's highest logits per prompt and step, with blocks skipped, no cache."""
    factory: Any = AutoModelForCausalLM
    with quiet_transformers():
        model = factory.from_pretrained(source, dtype=torch.float32).eval()
    stop_rescaling(model)
    liked = []
    with torch.no_grad(), skip_blocks(model, removed):
        for ids in prompts:
            grown = list(ids)
            steps = []
            for _ in range(new_tokens):
                logits = (
                    model(torch.tensor([grown]), use_cache=False).logits[0, -1].float()
                )
                top = logits.topk(KEPT)
                tokens = top.indices.tolist()
                values = top.values.tolist()
                steps.append({str(t): v for t, v in zip(tokens, values, strict=True)})
                grown.append(tokens[0])
            liked.append(steps)
    return liked


def ask(client: str, python: Path, job: Content, seconds: float) -> Content:
    """Run one client and return its answer, which holds an error if it failed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Run the engine in the client's process, so that the error returned is the one raised.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "GGML_NO_BACKTRACE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        question = Path(folder) / "job.json"
        answer = Path(folder) / "answer.json"
        write(question, job)
        command = [str(python), str(WORKER), client, str(question), str(answer)]
        try:
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {seconds:g} seconds"}
        found = {"error": f"exit status {done.returncode}"}
        if answer.is_file():
            found = read(answer)
    if "error" in found:
        found["error"] = error_line(found["error"], done.stderr + done.stdout)
    return found


def error_line(error: str, log: str) -> str:
    """Return an exception in one line, with the log's last error line if that tells more."""
    first = error.splitlines()[0] if error else ""
    said = [
        line.strip()
        for line in log.splitlines()
        if re.search("error|assert", line, re.I)
    ]
    said = [line for line in said if first not in line and "Error: " not in line]
    return f"{first} ({said[-1]})" if said else first
