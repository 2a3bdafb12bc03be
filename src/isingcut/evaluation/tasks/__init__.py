"""Task files for lm-evaluation-harness that read questions from a local folder.

Each YAML file is a harness task configuration over the columns of isingcut's data files (`context`,
`choices`, `answer`; `text`; `solution`). Its block `isingcut` names the files and the metric that
is reported. It is removed before the configuration is passed to the harness.
"""
