"""Measuring a model that is streamed: blocks in the outer loop.

`states` measured losses, `gradients` `slopes` `graphs` gate gradients, `boundary` hidden states
between blocks, `pace` progress of a sweep.
"""
