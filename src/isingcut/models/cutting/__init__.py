"""Cut: `checkpoint` the smaller safetensors checkpoint, `gguf` the smaller GGUF and what a patch
changed in it, `verify` the proof that a cut computes what it should, `sharing` a cut beside its
original in memory.
"""
