"""Text to token samples.

`corpora` where text comes from: `text_files` `packaged` `hub_datasets` `held`;
`mixture` several of them by shares of tokens; `chat_templates` conversations, and
`answers` the assistant's part in them;
`encoder` text -> tokens; `tokens` samples and batches; `calibration` the three splits of a run;
`overlap` text in two splits; `healing_text` text to heal with and to fit a patch on;
`generation` text that a model makes.
"""
