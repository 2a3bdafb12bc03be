"""The linear patch: `absorb` which layer takes a map, `exact` the map of one cut, `least_squares`
how it is solved, `files` the patched checkpoint.
"""
