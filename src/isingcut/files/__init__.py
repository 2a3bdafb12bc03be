"""Everything read from disk and written to it.

`inputs` a user's files, read within bounds; `writing` files and folders, written whole or not at
all, by one writer, over nothing of a user's; `documents` what each kind of results file holds;
`journal` rows that a kill leaves intact; `provenance` what made a result.
"""
