"""A run.

`folder` its files, `session` its model, `removal` what may go, `measuring` `stages`
`healing_stages` `comparison` one function a stage, `pipeline` the whole job, `api` `api_run` the
Python door, `block_lists` `mergekit` `interop_hub` other tools, `plan` (`prices` `probe`) what it
would take, `demo`.
"""
