"""The linear patch: `linear` fits the maps of a state's cuts, `layers` finds what takes a map,
`least_squares` solves, `tuning` tunes on the loss, `files` writes the patched checkpoint, `float8`
its layers that were quantised.
"""
