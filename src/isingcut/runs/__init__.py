"""Runs: the stages from a model to a report.

`stages`: how a stage runs; `pipeline`: the table of stages, and whole jobs.
`folder`: the files of a run; `checks`: options, folder and text, before torch is imported;
`constraints`: what a removal must fulfil; `solving`: the stages without a model (no torch);
`context`: the model, opened on first use, and how it is computed; `measuring`: text and energy;
`cutting`: cut, patch and heal the model; `packing`: choose a GGUF type; `ranking`: measure
candidates and baseline choices; `trials`: patched candidates; `evaluating`, `benchmarking`: score
models on text and on tasks; `api`: the Python API; `prices`: the costs of a model, which plans are
made from.
"""
