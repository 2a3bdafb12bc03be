"""Run folders to pages; files only, no torch.

`run_files` reads the files of a removal, as the objects of `files.documents`; `write` lays them out
as report.md, .json and .html, `compare` several runs, `card` the model card. The sentences of all
stand in `templates/words.j2`, which `words` speaks; `rows` figures of several models, `states` the
states and methods shown; `blocks` `figures` charts, with the scales of `svg`; `render` fills in
templates.
"""
