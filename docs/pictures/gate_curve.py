"""Measure how the KL to the original grows while one block is faded out: data/gate_curve.json.

    python docs/pictures/gate_curve.py [--model smollm2]

For each block, the block gate goes from 1 (the original) to 0 (removed); the KL is per token.
`make.py` draws it with the parabola that the curvature at gate 1 predicts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from isingcut.data.calibration import TextSampler, build
from isingcut.formats.sources import resolve
from isingcut.measure.gates import run_gated
from isingcut.models import load as models
from isingcut.models.replay import Replay

STEPS = 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--blocks", type=int, nargs="+", default=[17, 29, 1])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    arguments = parser.parse_args()
    loaded = models.load(resolve(arguments.model), dtype="float32")
    tokens = build(
        "wiki",
        TextSampler(loaded.tokenizer, arguments.length, 0),
        samples=arguments.samples,
        rank_samples=2,
        report_samples=2,
    ).splits["energy"]
    replay = Replay(loaded.model)
    n = len(replay)
    alphas = torch.linspace(0, 1, STEPS).tolist()
    sums = torch.zeros(len(arguments.blocks), STEPS, dtype=torch.float64)
    count = 0
    with torch.inference_mode():
        for s in range(tokens.samples):
            batch = tokens.select([s])
            recording = replay.record(batch.input_ids)
            stream = [recording.entered]
            for i in range(n):
                stream.append(recording.block(i, stream[-1]))
            reference = recording.logits(stream[-1][0], 0)[:-1].double().log_softmax(-1)
            count += len(reference)
            for row, i in enumerate(arguments.blocks):
                for k, alpha in enumerate(alphas):
                    gate = torch.tensor([alpha])
                    hidden = run_gated(
                        recording, i, stream[i], gate, "block", ones=False
                    )
                    for j in range(i + 1, n):
                        hidden = recording.block(j, hidden)
                    logp = recording.logits(hidden[0], 0)[:-1].double().log_softmax(-1)
                    sums[row, k] += (reference.exp() * (reference - logp)).sum()
            print(f"sample {s + 1} of {tokens.samples}", flush=True)
    content = {
        "model": arguments.model,
        "unit": "nats/token",
        "samples": tokens.samples,
        "tokens": count,
        "blocks": arguments.blocks,
        "gate": alphas,
        "kl": [[round(v, 6) for v in row] for row in (sums / count).tolist()],
    }
    target = Path(__file__).parent / "data" / "gate_curve.json"
    target.write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
