"""A run.

`folder` its files, `solving` what may go and the stages that need no model (without torch),
`session` its model and the processes that share it, `measuring` text and energy, `cutting` the
model that is cut, patched and healed, `stages` what is measured of states and models, `pipeline`
the whole job and the Python door, `interop_hub` the hub, `plan` what it would take, `demo`.
"""
