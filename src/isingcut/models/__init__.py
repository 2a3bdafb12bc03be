"""Run models: load them, run single blocks, and compare a cut with its original.

`inspect`: blocks and legal states without weights; `load`: a frozen model in memory; `device`:
device, dtype, memory; `placement`: several devices; `replay`: run block i on any hidden states;
`sublayers`: layers split into attention and MLP; `compute/`: head, losses, micro-batch;
`streaming/`: models larger than memory; `sharing`: a cut with the memory of its original; `verify`:
the proof of a cut; `packing`: weights in GGUF types.
"""
