"""Everything read from disk and written to it.

`inputs` a user's files, read within bounds; `outputs` what may be replaced; `locks` one writer at a
time; `writing` JSON and folders, written whole or not at all; `documents/` what each kind of
results file holds; `tensors` arrays with a header; `journal` rows that a kill leaves intact;
`provenance` what made a result.
"""
