"""Remove 6 blocks from a model and generate with the result: python examples/prune.py MODEL OUT."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import isingcut


def main(model: str, out: str) -> None:
    run = isingcut.prune(model, remove=6, samples=8, length=128, progress=True)
    print(f"blocks {run.chosen.removed} removed: KL {run.chosen.kl:.3f} nats per token")
    run.save(out)
    cut = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("The most useful thing about physics is", return_tensors="pt")
    print(
        tokenizer.decode(
            cut.generate(**ids, max_new_tokens=30)[0], skip_special_tokens=True
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
