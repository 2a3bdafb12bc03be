"""Run folders to pages; files only, no torch.

`run_files` reads the files of a removal, as `files.documents`; `write` lays them out as report.md,
.json and .html, and several runs as one page; `card` writes the model card. The sentences of all
are in `templates/words.j2`; `words` renders them, and the pages. `rows`: figures of several models;
`figures`: states, methods and charts.
"""
