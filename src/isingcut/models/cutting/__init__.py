"""Cut models: `checkpoint` writes the smaller safetensors checkpoint, `gguf` the smaller GGUF file
with its patch, `packing` computes sizes in GGUF types and packs weights, `verify` compares a cut
with its original, `sharing` loads a cut that shares the memory of its original.
"""
