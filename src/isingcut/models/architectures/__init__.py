"""Find the blocks of a decoder, and cut them out of its configuration.

`blocks` finds the stack, describes each block, and skips some of them. `fields` is the table of
per-layer fields. `families` is what does not fit a table. `cuts` applies both and returns the
smaller configuration.
"""
