"""Inner loops.

`head` the output head with the loss, `divergence` KL and NLL from logits, `tuning` the micro-batch.
"""
