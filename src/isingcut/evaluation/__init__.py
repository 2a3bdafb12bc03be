"""What a cut cost.

`quality` perplexity and KL, in memory or from disk; `speed` `measure_process` speed
and memory; `candidates` the spectrum measured, and how well the energy ranks; `scores` `harness`
`local_tasks` `tasks/` `wikitext` benchmarks; `paired` paired statistics.
"""
