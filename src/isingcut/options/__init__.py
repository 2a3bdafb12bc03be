"""Options: `config` every option of a run, `healing` of healing, `declaration` how one is declared
and checked, `types` their bounds and words, `spellings` what is typed for them, `yaml_file` files.
"""
