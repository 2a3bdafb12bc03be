"""What removals and gates do to the loss.

`losses` measured KL and NLL of states, prefixes shared; `gates` `gradients` `loss_gradient`
`curvature` derivatives; `streams` activations at block boundaries; `ledger` what a search paid;
`streamed/` the same block by block from disk; `work` how it is carried out; `sharing` by several
processes, in `pieces`.
"""
