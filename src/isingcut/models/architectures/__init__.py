"""Find the blocks of a decoder, and cut them out of its configuration.

`blocks` the stack, what a block is and costs, and the model without some of them. How a
configuration is cut: `fields` what they mean, as data, and where they stand; `families` what is no
table; `cuts` both applied: the smaller configuration.
"""
