"""Reading from disk and writing to it.

`inputs`: read your files, within size limits; `writing`: write files and folders atomically, under
a lock; `ownership`: tell isingcut's files from yours, so that none of yours is replaced; `results`:
write and read results files; `documents`: the content of each kind of results file; `journal`: rows
of a measurement, for resuming; `provenance`: what a result was made with.
"""
