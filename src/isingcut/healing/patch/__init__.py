"""What repairs share: `layers` finds layers for a linear map, `ridge` fits it, `files` writes new
layers to a checkpoint.
"""
