"""Options: `config` every option of a run and of healing, `declaration` how one is declared,
checked and read from YAML, `spellings` what is typed for them.
"""
