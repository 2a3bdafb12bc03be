"""Inner loops.

`head` the output head with the loss, `divergence` `kernels` KL and NLL from logits, `attention`
another attention for a while, `tuning` what suits this machine.
"""
