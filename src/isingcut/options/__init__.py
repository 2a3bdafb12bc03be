"""Options. `config`: every option of a run and of healing; `declaration`: declare options, check
values and read them from YAML; `parsed`: texts with parsed values.
"""
