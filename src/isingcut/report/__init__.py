"""Reports and model cards, made from the files of a run folder without torch.

`run_files`: the files of one removal; `write`: report.md, .json and .html, and one page for several
runs; `card`: the model card; `words`: sentences of `templates/words.j2`, and rendered
templates; `rows`: figures of several models; `states`: the states and methods of a removal;
`figures`: the map of states, h, J and charts; `plots`: scales, marks and plots.
"""
