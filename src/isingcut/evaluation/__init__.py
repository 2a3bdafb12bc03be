"""What a cut cost.

`quality` perplexity and KL, in memory or from disk; `speed` speed and memory; `candidates` the
spectrum measured, and how well the energy ranks; `questions` `tasks/` benchmark tasks; `answers` of
many states; `scores` `harness` of them; `benchmark` both models on them, compared in pairs, and
candidates chosen by them.
"""
