"""Win quality back.

`heal` a checkpoint, `job` what a healer is given, `healers/` one file a healer, `patch/` and
`training/` what they are made of, `recipe` what a budget buys, `judging` when a training ends
before its last step, `figures` what was won on text held out, `removed` which blocks a cut lacks
and of which model, `checks` before anything is loaded, `trainer_file` the file of `--trainer`,
`work_folder` what is kept to resume.
"""
