"""Options: `declaration` how one is declared and checked, `config` every option of a run and of
healing, `spellings` what is typed for them, `yaml_file` files of options.
"""
