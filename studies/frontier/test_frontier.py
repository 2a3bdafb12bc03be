"""Tests of the frontier study: its losses against a hand computation, and its best files."""

import numpy as np
import pytest

from studies.frontier.llama import losses
from studies.frontier.study import best_files


def test_losses_are_those_by_hand_and_a_beaten_file_is_not_among_the_best():
    p = np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [1, 1, 1]])
    q = np.array([[0.25, 0.25, 0.5]] * 3)
    kl, nll = losses(np.log(q), 3 + np.log(p), [0, 2, 1])
    by_hand = (p[:2] * np.log(p[:2] / q[:2])).sum() / 2
    assert (kl, nll) == pytest.approx((by_hand, (np.log(2) + np.log(4)) / 2))
    files = [
        {"decode": d, "kl": k}
        for d, k in ((1.0, 0.0), (1.2, 0.3), (1.1, 0.2), (1.3, 0.1))
    ]
    assert best_files(files, "decode") == [files[3], files[0]]
