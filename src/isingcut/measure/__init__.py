"""What removals and gates do to the loss.

`losses` measured KL and NLL of states; `tree` what states share; `gradients` `curvature`
derivatives in `gates`; `sweep` `graphs` gradients with one block open at a time; `boundaries`
`pace` hidden states between blocks, and how many of them; `streams` activations at block
boundaries; `ledger` what a search paid; `work` how it is
carried out; `sharing` by several processes, in `pieces`.
"""
