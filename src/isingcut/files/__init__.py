"""Read and write files.

`inputs`: read user files, within size limits; `writing`: write files and folders atomically, under
a lock; `ownership`: distinguish isingcut's files from user files, which are never replaced;
`results`: write, read and check results files; `states`,
`cuts`, `evaluations`, `healings`, `runs`: pydantic models of that content, by stage; `schema`:
base classes and types of these models; `journal`: rows of a measurement, for resuming;
`provenance`: versions, machine and sources of a result; `stages`: the
files of the stages, and what each depends on; `store`: a folder of results, their records, and
which are out of date.
"""
