"""What a cut cost.

`quality` perplexity and KL, in memory or from disk; `speed` `measure_process` speed
and memory; `candidates` the spectrum measured, and how well the energy ranks; `questions`
`tasks/` benchmark tasks; `likelihoods` and `generations`: the answers of many
states; `scores` `harness` of them; `benchmark` both models on them;
`choosing` candidates compared by them; `paired` paired statistics.
"""
