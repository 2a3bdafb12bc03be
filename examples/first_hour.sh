#!/usr/bin/env bash
# The commands of docs/first_hour.md: examples/first_hour.sh, in a fresh clone.
# That page shows the output. Run this again after a change to what is printed.
set -euo pipefail
cd "$(dirname "$0")/.."

say() {
    printf '\n$ %s\n' "$*"
    eval "$*"
}

say make demo
say . .venv/bin/activate

# Your own model and text. Here they are SmolLM2 as a folder and Python's language reference.
say 'cp -rL "$(python -c "from isingcut.models.sources import resolve; print(resolve(\"smollm2\"))")" my-model'
say 'python -c "from pydoc_data.topics import topics; print(*topics.values())" > my-text.txt'

say isingcut inspect ./my-model
say isingcut plan ./my-model --remove 8 --length 128
say isingcut run ./my-model --budget params=20% --calibration my-text.txt --length 128 --out my-run
say isingcut baseline block-influence my-run
say isingcut report my-run
say 'python -c "
from transformers import pipeline
cut = pipeline(\"text-generation\", \"my-run/model\")
print(cut(\"The most useful thing about physics is\", max_new_tokens=30, do_sample=False)[0][\"generated_text\"])
"'
