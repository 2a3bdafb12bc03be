"""Read text and make token samples.

`corpora`: sources of text; `text_files`: files and pipes; `mixture`: names of texts, and mixtures
by shares of tokens; `conversations`: chat templates and the assistant's tokens; `tokens`: tokens,
samples, batches and overlap; `calibration`: the three splits of a run; `healing_text`: text for
healing and for the patch; `generation`: text that a model generates.
"""
