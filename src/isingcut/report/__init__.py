"""Run folders to pages; files only, no torch.

`read_run` reads the files into `run_files`; `write` writes report.md, .json, .html and comparisons;
`page` `compare` (`sides`) the HTML, `card` the model card, `render` templates. What they lay out:
`rows` figures of several models, `states` `baselines` states, `provenance_rows` origins, `words`
`choice` `fidelity` sentences; `blocks` `figures` `tradeoff` charts, drawn by `svg`.
"""
