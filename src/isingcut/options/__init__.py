"""Options. `config`: all of a run, composed of one file for each part that reads them; `heal`: also
those of healing; `declaration`: declare options, check values and read them from YAML; `parsed`:
types, and texts with parsed values.
"""
