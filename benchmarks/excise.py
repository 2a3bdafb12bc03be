"""Cut a synthetic sharded bf16 checkpoint: peak memory, and speed against `cp` of the same files.

Both sides write to the same disk and are timed until `sync` returns, in turn, `--rounds` times;
the speed is bytes written per second. Run: python benchmarks/excise.py [--gb 14]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 64000
SHARD_BYTES = 5 * 2**30
CHILD = """
import json, resource, sys, time, os
from pathlib import Path
from isingcut.models.cutting.checkpoint import excise
start = time.perf_counter()
excise(Path(sys.argv[1]), json.loads(sys.argv[3]), Path(sys.argv[2]))
os.sync()
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak}))
"""


def tensors(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama of that depth."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        block = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            shapes[f"{block}self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            shapes[f"{block}mlp.{name}_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{block}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{block}input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{block}post_attention_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return shapes


def size_of(shape: tuple[int, ...]) -> int:
    """Bytes in bf16."""
    elements = 1
    for n in shape:
        elements *= n
    return 2 * elements


def make_source(folder: Path, layers: int) -> int:
    """Write the checkpoint in shards of random bytes; returns its bytes."""
    noise = os.urandom(64 * 2**20)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors(layers).items():
        if shards[-1] and filled + size_of(shape) > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size_of(shape)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for name, shape in shard.items():
            end = offset + size_of(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, offset, len(noise)):
                f.write(noise[: min(len(noise), offset - start)])
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(p.stat().st_size for p in folder.iterdir())


def time_cp(source: Path, out: Path) -> float:
    """Seconds of `cp -r` and `sync`."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    os.sync()
    return time.perf_counter() - start


def time_excise(source: Path, out: Path, removed: list[int]) -> tuple[float, int]:
    """Seconds (imports left out) and peak bytes of a process that cuts and syncs."""
    os.sync()
    words = [sys.executable, "-c", CHILD, str(source), str(out), json.dumps(removed)]
    result = subprocess.run(words, check=True, capture_output=True, text=True)
    report = json.loads(result.stdout.splitlines()[-1])
    return float(report["seconds"]), int(report["peak"])


def main() -> None:
    """Make the checkpoint, time both sides in turn, print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=14.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: temp")
    options = parser.parse_args()
    block = sum(size_of(s) for n, s in tensors(1).items() if ".layers." in n)
    rest = sum(size_of(s) for n, s in tensors(1).items() if ".layers." not in n)
    layers = max(2, round((options.gb * 1e9 - rest) / block))
    removed = list(range(1, layers, 4))  # every fourth block
    rates: dict[str, list[float]] = {"cp": [], "excise": []}
    peak = 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        source.mkdir()
        total = make_source(source, layers)
        print(f"{total / 1e9:.2f} GB, {layers} blocks, {len(removed)} removed")
        print(f"{'side':8} {'GB written':>10} {'seconds':>8} {'GB/s':>6} {'peak MB':>8}")
        for _ in range(options.rounds):
            for side in ("cp", "excise"):
                memory = 0
                if side == "cp":
                    seconds = time_cp(source, out)
                else:
                    seconds, memory = time_excise(source, out, removed)
                    peak = max(peak, memory)
                written = folder_bytes(out)
                rates[side].append(written / seconds)
                shown = f"{memory / 1e6:8.0f}" if memory else f"{'':8}"
                print(
                    f"{side:8} {written / 1e9:10.2f} {seconds:8.1f} "
                    f"{written / seconds / 1e9:6.2f} {shown}",
                    flush=True,
                )
                shutil.rmtree(out)
    speed = statistics.median(rates["excise"]) / statistics.median(rates["cp"])
    print(f"excise_peak_mb: {peak / 1e6:.1f}")
    print(f"excise_speed_over_cp: {speed:.3f}")


if __name__ == "__main__":
    main()
