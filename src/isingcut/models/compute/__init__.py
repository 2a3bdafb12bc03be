"""Performance-critical computations.

`head`: output head with the loss; `divergence`: KL and NLL of logits.
"""
