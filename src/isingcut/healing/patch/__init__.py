"""The linear patch: `absorb` which layer takes a map, `least_squares` the map, `files` the
patched checkpoint.
"""
