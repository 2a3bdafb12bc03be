"""Recover the quality of a cut model.

`heal`: heal a checkpoint; `job`: one healing, early stopping, and training settings; `patch/`,
`training/`: the two repairs; `removed`: the blocks that a cut lacks, and its original;
`work_folder`: the state for resuming.
"""

RECORD = "healing.json"
"""The record of healing in a healed checkpoint."""
