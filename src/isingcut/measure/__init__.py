"""Measure the effect of removals and gates on the loss.

`losses`: KL and NLL of states; `ledger`: their cost in a search; `gradients`, `curvature`:
derivatives in the `gates`; `packed`: KL with other weights; `streams`: activations at block
boundaries; `work`: measurements by one process or several; `splitting`: how much is computed at a
time.
"""
