"""Recover the quality of a cut model.

`checks`: what is checked before torch is imported; `heal`: heal a checkpoint; `job`: one healing,
early stopping, and training settings; `repairs/`: ways to change layers; `patch/`: what they share;
`training/`: distillation; `removed`: find the removed blocks and check the original; `work_folder`:
the stored state for resuming.
"""

RECORD = "healing.json"
"""File name of the healing record in a healed checkpoint."""
CUT = "isingcut.json"
"""File name of the record of the cut in a cut checkpoint."""
