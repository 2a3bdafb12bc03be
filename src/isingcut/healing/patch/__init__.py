"""The linear patch: `absorb` and `gains` which layer takes a map, `exact` and `approximate` the map
of one cut, `least_squares` how it is solved, `fitting` the cuts of a state, `files` the patched
checkpoint, `float8` its layers that were quantised.
"""
