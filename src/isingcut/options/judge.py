"""Options of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from isingcut.options import parsed
from isingcut.options.declaration import Options, option


@dataclass(frozen=True, init=False)
class JudgeOptions(Options):
    """The tasks and prompts that models are judged by."""

    tasks: str = option(
        "",
        "Benchmarks for both models, comma-separated: lm-evaluation-harness tasks, instructions, "
        "needle, with --data the tasks that isingcut ships, or your own .jsonl files of questions.",
    )
    data: str = option(
        "",
        "Folder with the questions of --tasks (default: the hub).",
    )
    questions: parsed.Count | None = option(
        None, "Most questions per task (default: all)."
    )
    prompts: str = option(
        "",
        "Your own prompts for both models to answer: a text with one a line, or JSON lines with "
        "messages.",
    )
