"""Inner loops.

`head` the output head with the loss, `divergence` `kernels` KL and NLL from logits, `attention`
causal attention for CPUs, `tuning` what suits this machine.
"""
