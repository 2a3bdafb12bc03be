"""Cut: `checkpoint` the smaller safetensors checkpoint, `gguf` the smaller GGUF, `gguf_patch` is it
of the same model and what a patch changed in it, `verify` the proof that a cut computes what it
should, `images` prompts with an image, `sharing` a cut beside its original in memory.
"""
