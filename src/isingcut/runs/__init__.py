"""A run.

`manifest` `folder` its files, `session` its model, `joining` the processes that share it,
`removal` what may go, `measuring` `stages` `healing_stages` `comparison` one function a stage,
`pipeline` the whole job, `api` `api_run` the Python door, `block_lists` `mergekit` `interop_hub`
other tools, `plan` (`prices` `probe`) what it would take, `demo`.
"""
