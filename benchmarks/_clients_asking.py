"""The reference of `clients.py`, a client's answer, and what of both is kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from isingcut.models.architectures import find_stack, skipped
from isingcut.models.architectures.families import stop_rescaling
from isingcut.models.loading import quiet_transformers

WORKER = Path(__file__).with_name("_clients_worker.py")
KEPT = 50  # logits at each step
Liked = list[list[dict[str, float]]]


def greedy(
    source: Path, removed: Sequence[int], prompts: Sequence[list[int]], new_tokens: int
) -> Liked:
    """Of each prompt and step, the highest logits of the original with blocks skipped, no cache."""
    factory: Any = AutoModelForCausalLM
    with quiet_transformers():
        model = factory.from_pretrained(source, dtype=torch.float32).eval()
    stop_rescaling(model)
    liked = []
    with torch.no_grad(), skipped(model, find_stack(model), removed):
        for ids in prompts:
            grown, steps = list(ids), []
            for _ in range(new_tokens):
                logits = model(torch.tensor([grown]), use_cache=False).logits[0, -1].float()
                top = logits.topk(KEPT)
                tokens, values = top.indices.tolist(), top.values.tolist()
                steps.append({str(t): v for t, v in zip(tokens, values, strict=True)})
                grown.append(tokens[0])
            liked.append(steps)
    return liked


def digest(path: Path) -> str:
    """Of a GGUF file, or of a checkpoint's configuration and weights."""
    found = hashlib.sha256()
    files = (
        [path] if path.is_file() else [path / "config.json", *sorted(path.glob("*.safetensors"))]
    )
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()


def kept(file: Path, key: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` gives, from ``file`` where that was made for the same ``key``."""
    key = json.loads(json.dumps(key))
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["key"] == key:
            return dict(known["content"])
    content = make()
    if "error" in content:  # asked again next time
        return content
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"key": key, "content": content}), encoding="utf-8")
    part.rename(file)
    return content


def ask(client: str, python: Path, job: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One client's answer, whatever becomes of it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # In this process, so that the error that comes back is the one that was raised.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "GGML_NO_BACKTRACE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "asked.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(job), encoding="utf-8")
        command = [str(python), str(WORKER), client, str(asked), str(answer)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return {"versions": {}, "error": f"no answer within {seconds:g} seconds"}
        log = done.stderr + done.stdout
        if not answer.is_file():
            found = {"versions": {}, "error": f"exit status {done.returncode}"}
        else:
            found = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        found["error"] = error_line(found["error"], log)
    return found


def error_line(error: str, log: str) -> str:
    """An exception in one line; what the program said before it, where that tells more."""
    first = error.splitlines()[0] if error else ""
    said = [line.strip() for line in log.splitlines() if re.search("error|assert", line, re.I)]
    said = [line for line in said if first not in line and "Error: " not in line]
    return f"{first} ({said[-1]})" if said else first
