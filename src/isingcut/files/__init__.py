"""Reading from disk and writing to it.

`inputs`: read your files, within size limits; `writing`: write files and folders atomically, under
a lock; `ownership`: tell isingcut's files from yours, so that none of yours is replaced; `results`:
write and read results files; `documents`: check their content by its kind; `states`, `cuts`,
`evaluations`, `healings`, `runs`: the models of that content, by stage; `schema` and `values`: what
these are made of; `journal`: rows of a measurement, for resuming; `provenance`: what a result was
made with.
"""
