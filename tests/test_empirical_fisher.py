"""Standard errors of the empirical-Fisher energy against resampling by brute force."""

import numpy as np
import pytest

from isingcut.energies.empirical_fisher import EmpiricalFisher, energy_errors, energy_terms
from isingcut.measure.gradients import gate_gradients
from isingcut.measure.work import Work
from tiny import random_tokens, tiny_replay

linear_or_not = pytest.mark.parametrize("linear", [False, True])


def gradients(m, seed=3):
    """Rows (m, 5) with means, correlations and a heavy tail."""
    rng = np.random.default_rng(seed)
    return rng.standard_t(5, (m, 5)) @ rng.standard_normal((5, 5)) + 0.3


@linear_or_not
@pytest.mark.parametrize("m", [2, 3, 25])
def test_errors_are_those_of_the_jackknife(linear, m):
    rows = gradients(m)
    left_out = [energy_terms(np.delete(rows, s, 0), linear=linear) for s in range(m)]
    got = energy_errors(rows, linear=linear)
    for error, values in zip(got, map(np.array, zip(*left_out, strict=True)), strict=True):
        spread = ((values - values.mean(0)) ** 2).sum(0)
        np.testing.assert_allclose(error, np.sqrt((m - 1) / m * spread), rtol=1e-9, atol=1e-12)


def test_samples_that_agree_have_no_error():
    rows = np.repeat(gradients(1), 7, axis=0)
    for linear in (False, True):
        h_error, J_error = energy_errors(rows, linear=linear)
        np.testing.assert_allclose(h_error, 0, atol=1e-12)
        np.testing.assert_allclose(J_error, 0, atol=1e-6)
        assert not np.diag(J_error).any()


@linear_or_not
def test_the_energy_carries_its_errors(linear):
    replay, tokens = tiny_replay(), random_tokens()
    found = EmpiricalFisher(linear=linear).measure(replay, tokens, Work())
    h_error, J_error = energy_errors(gate_gradients(replay, tokens), linear=linear)
    np.testing.assert_allclose(found.h_error, h_error, rtol=1e-6)
    np.testing.assert_allclose(found.J_error, J_error, rtol=1e-6)
    assert (found.h_error > 0).all()
    one = EmpiricalFisher(linear=linear).measure(replay, tokens.select([0]), Work())
    assert one.h_error is None
    assert one.J_error is None
