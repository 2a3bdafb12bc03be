"""Streaming: run a model larger than memory, one block at a time from its safetensors.

    reader     assign stored tensors to parts, and read a part, converted, into a buffer
    store      two such buffers: one part in use while a thread fills the other
    replay     open a checkpoint in this way, as in `isingcut.models.replay.Replay`

All tensors outside the blocks, the embedding and the head (final norm, position embeddings, rotary
buffers) are small and stay in memory. So the peak is two parts and the hidden states that the
memory limit allows, whatever the model's size.
"""
