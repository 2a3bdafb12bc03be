"""A run.

`folder` its files, `session` its model and the processes that share it,
`removal` what may go; one function a stage in `measuring` (text and energy), `solving` (solve and
report, without torch), `stages` (rank and evaluate), `cutting`, `healing_stages`
(`healing_options`), `trials`, `benchmarking` and `comparison`; `pipeline` the whole job, `api` the
Python door, `interop_hub` the hub, `plan` what it would take, `demo`.
"""
