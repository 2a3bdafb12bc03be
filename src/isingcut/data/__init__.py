"""Text to token samples.

`corpora` where text comes from, `text_files` files and pipes; `mixture` how texts are named, and
several by shares of tokens; `conversations` chat templates, and the assistant's part; `tokens`
text -> tokens, samples, batches, text in two splits; `calibration` the three splits of a run;
`healing_text` text to heal with and to fit a patch on; `generation` text that a model makes.
"""
