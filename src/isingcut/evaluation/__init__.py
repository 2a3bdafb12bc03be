"""What a cut cost.

`quality` perplexity, KL, speed; `measure_process` peak memory; `streamed_scores` the same from
disk; `candidates` the spectrum measured, and how well the energy ranks; `scores` `harness`
`local_tasks` `tasks/` benchmarks; `paired` paired statistics.
"""
