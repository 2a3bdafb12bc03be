"""Win quality back.

`heal` a checkpoint, `job` what a healer is given, `healers/` one file a healer, `patch/` and
`training/` what they are made of, `removed` which blocks a cut lacks, `checks` before anything is
loaded, `work_folder` what is kept to resume.
"""
