"""The linear patch: `linear` fits the maps of a state's cuts, `layers` finds layers for a map,
`files` writes new layers to a checkpoint, `checkpoint` fits, tunes and verifies.
"""
