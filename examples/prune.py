"""Cut 6 blocks out of a model and generate with the result: python examples/prune.py MODEL OUT."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import isingcut
from isingcut.progress import terminal


def main(model: str, out: str) -> None:
    folder = isingcut.run(model=model, remove=6, out=out, samples=8, length=128, progress=terminal)
    cut = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("The most useful thing about physics is", return_tensors="pt")
    print(tokenizer.decode(cut.generate(**ids, max_new_tokens=30)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
