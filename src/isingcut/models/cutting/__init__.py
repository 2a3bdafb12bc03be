"""Cut: `checkpoint` the smaller safetensors checkpoint, `gguf` the smaller GGUF, `gguf_match` is it
of the same model, `verify` the proof that a cut computes what it should, `images` prompts with
an image.
"""
