"""Measure the effect of removals and gates on the loss.

`losses`: KL and NLL of states; `ledger`: their cost in a search; `gradients`:
derivatives with respect to the `gates`; `packed`: KL with changed weights; `streams`: activations
at block boundaries; `work`: measurements by one process or several; `splitting`: micro-batches that
fit in memory, and their size.
"""
