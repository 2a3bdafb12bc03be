"""Cut: `checkpoint` the smaller safetensors checkpoint, `gguf` the smaller GGUF, `gguf_match` is it
of the same model, `verify` the proof that a cut computes what it should, `generation` with and
without a cache, `difference` of logits, `images` prompts with an image.
"""
