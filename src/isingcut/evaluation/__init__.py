"""Evaluate cut models.

`quality`: perplexity and KL; `metrics/`: further figures; `speed`: prefill and decoding;
`candidates`: measured losses of the spectrum, and rank correlations; `questions`: benchmark tasks;
`checks`: tasks that a program judges; `prompts`: answers of both models to fixed prompts;
`answers`: log-likelihoods and generations of many states; `scores`, `harness`: scores by
lm-evaluation-harness; `benchmark`: paired comparison of two models, and choice of candidates;
`failures`: parts that could not be measured.
"""
