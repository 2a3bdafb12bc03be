"""How often a model accepts what its MTP layer drafts, before and after a cut.

    python benchmarks/mtp.py TEXT.jsonl WORK [--minutes 6]

Trains a model of 12 blocks with one layer for multi-token prediction (MTP), in the form of
DeepSeek-V3, on the first half of ``TEXT.jsonl``, runs `isingcut run` on it and prints the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers.modeling_layers import MtpModel

from isingcut.evaluation.quality import open_mtp
from isingcut.models.load import load
from isingcut.testing.tiny import tiny_model, tiny_tokenizer

_SHAPE = {
    "num_hidden_layers": 12,
    "hidden_size": 96,
    "intermediate_size": 256,
    "first_k_dense_replace": 12,
    "moe_intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_mtp_layers": 1,
    "max_position_embeddings": 512,
}
_BATCH, _LENGTH = 16, 128


def train(text: Path, out: Path, minutes: float) -> None:
    """Train the model and its MTP layer together and save both as one checkpoint."""
    tokenizer = tiny_tokenizer()
    lines = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    ids = torch.tensor(tokenizer("\n\n".join(lines[: len(lines) // 2]))["input_ids"])
    torch.manual_seed(0)
    model = tiny_model("deepseek_v3", vocab_size=len(tokenizer), **_SHAPE).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    mtp = MtpModel(model, 1).train()
    torch.nn.init.normal_(mtp.layers[0].eh_proj.weight, std=0.05)
    parameters = {id(p): p for p in (*model.parameters(), *mtp.parameters())}
    optimiser = torch.optim.AdamW(parameters.values(), lr=2e-3, weight_decay=0.01)
    start, step = time.monotonic(), 0
    positions = torch.arange(1, _LENGTH)[None]
    while (spent := (time.monotonic() - start) / 60) < minutes:
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * max(0.05, 1 - spent / minutes)
        starts = torch.randint(len(ids) - _LENGTH, (_BATCH,))
        batch = torch.stack([ids[i : i + _LENGTH] for i in starts.tolist()])
        found = model(input_ids=batch, output_hidden_states=True, use_cache=False)
        hidden = mtp.forward_layer(
            0, found.hidden_states[-1][:, :-1], positions, None, input_ids=batch[:, 1:]
        )
        loss = cross_entropy(found.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        drafts = mtp.shared_head(hidden)[:, :-1].flatten(0, 1)
        total = loss + 0.3 * cross_entropy(drafts, batch[:, 2:].flatten())
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimiser.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f} nats, both {total.item():.3f}", flush=True)
        step += 1
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    tensors = load_file(out / "model.safetensors")
    for name, tensor in mtp.layers[0].state_dict().items():
        place = f"model.layers.{_SHAPE['num_hidden_layers']}"
        tensors[f"{place}.{name.removeprefix('mtp_block.')}"] = tensor.contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def main() -> None:
    """Train, cut, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0)
    options = parser.parse_args()
    model, run = options.work / "model", options.work / "run"
    if not model.exists():
        train(options.text, model, options.minutes)
    command = (
        f"run {model} --remove 3 --calibration {options.text} --length 128 --out {run} --skip-speed"
    )
    subprocess.run(
        [sys.executable, "-m", "isingcut", *command.split(), "--out", str(run)], check=True
    )
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for name, key in (("original", "before"), ("cut", "cut"), ("patched", "after")):
        scores = found[key]
        print(f"mtp_acceptance_{name}: {scores['draft_acceptance']:.4f}")
        print(f"mtp_acceptance_{name}_se: {scores['draft_acceptance_se']:.4f}")
    for name, folder in (("original", model), ("patched", run / "model")):
        plain, drafting = time_generation(folder)
        print(f"mtp_speed_{name}: {drafting / plain:.3f}")


def time_generation(folder: Path, tokens: int = 96, repeats: int = 5) -> tuple[float, float]:
    """Measure tokens per second of greedy generation without and with drafts, interleaved."""
    model = load(folder).model
    assert open_mtp(model, folder) is not None
    ids = torch.arange(20, 52)[None]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats + 1):
        for use_mtp, spent in seconds.items():
            began = time.perf_counter()
            model.generate(ids, use_mtp=use_mtp, max_new_tokens=tokens, do_sample=False)
            spent.append(time.perf_counter() - began)
    plain, drafting = (tokens / statistics.median(spent[1:]) for spent in seconds.values())
    return plain, drafting


if __name__ == "__main__":
    main()
