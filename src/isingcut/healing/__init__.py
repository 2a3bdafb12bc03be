"""Win quality back.

`heal` a checkpoint, `job` what is healed and when a training ends before its last step, `patch/`
and `training/` how, `recipe` how long and at which rate, `removed` which blocks a cut lacks and of
which model, `work_folder` what is kept to resume.
"""

RECORD = "healing.json"
"""The file of a healed checkpoint that says what was done to it."""
