"""Cut models: `checkpoint` writes the smaller safetensors checkpoint, `gguf` the smaller GGUF file
with its patch, `packing` says what a model takes in GGUF's types and packs weights, `verify` checks
that a cut computes what it should, `sharing` loads a cut in the memory of its original.
"""
