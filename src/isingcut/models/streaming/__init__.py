"""Streaming: a model that is larger than memory, one block at a time from its safetensors.

    reader     which stored tensors fill which part, and their bytes, converted, in a buffer
    store      two such buffers: one part in use while a thread fills the other
    replay     a checkpoint opened in this way, its blocks as in `isingcut.models.replay.Replay`

What is neither a block nor the embedding nor the head (final norm, position
embeddings, rotary buffers) is small and stays. So the peak is two parts and the hidden states
that the memory allows, whatever the model's size.
"""
