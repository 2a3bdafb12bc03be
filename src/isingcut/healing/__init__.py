"""Win quality back.

`heal` a checkpoint, `job` what is healed, `patch/` and `training/` how, `recipe` how long and at
which rate, `judging` when a training ends before its last step, `removed` which blocks a cut lacks
and of which model, `checks` before anything is loaded, `trainer_file` the file of `--trainer`,
`work_folder` what is kept to resume.
"""
