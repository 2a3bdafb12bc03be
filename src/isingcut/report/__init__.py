"""Run folders to pages; files only, no torch.

`run_files` what the files say; `write` report.md, .json, .html, comparisons; `page` `compare`
the HTML; `card` the model card; `words` `sides` `score_rows` `baselines` `provenance_rows` rows and
sentences; `states` `blocks` `figures` `tradeoff` `svg` figures; `templates/`.
"""
