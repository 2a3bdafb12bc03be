"""The linear patch: `linear` fits the maps of a state's cuts, `layers` finds what takes a map,
`files` puts new layers into a checkpoint, `checkpoint` fits, tunes on the loss and verifies.
"""
