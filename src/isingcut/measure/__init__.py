"""What removals and gates do to the loss.

`losses` measured KL and NLL of states; `ledger` what a search paid for them; `gradients`
`curvature` derivatives in `gates`; `streams` activations at block boundaries; `work` how it is
carried out, by one process or several; `splitting` how much of it at a time.
"""
