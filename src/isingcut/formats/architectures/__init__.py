"""Find the blocks of a decoder, and cut them out of its configuration.

`blocks` finds the stack, describes each block, and skips some of them. `removed` is a state in all
forms that a cut needs. `fields` has the tables of per-layer fields. `families` handles what
does not fit a table. `cuts` applies both and returns the smaller configuration.
"""
