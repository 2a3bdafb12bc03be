import numpy as np
import pytest

from isingcut.errors import InputError
from isingcut.ising import constraints as con

KINDS = ["attention", "mlp", "attention", "moe", "mlp"]


def obeyed(rows, state):
    return all(row.satisfied(np.array([state]))[0] for row in rows)


def test_count():
    assert obeyed([con.count(4, 2)], [1, 0, 1, 0])
    assert not obeyed([con.count(4, 2)], [1, 1, 1, 0])
    with pytest.raises(InputError, match="cannot remove 5 of 4"):
        con.count(4, 5)


def test_kind_counts_keep_unnamed_kinds():
    rows = con.kind_counts(KINDS, {"attention": 1, "mlp": 2})
    assert obeyed(rows, [1, 1, 0, 0, 1])
    assert not obeyed(rows, [1, 1, 0, 1, 1])
    with pytest.raises(InputError, match=r"no block is of kind 'mamba'; this model has attention"):
        con.kind_counts(KINDS, {"mamba": 1})
    with pytest.raises(InputError, match="cannot remove 2 moe blocks of 1"):
        con.kind_counts(KINDS, {"moe": 2})


def test_keep_and_drop():
    assert obeyed(con.keep(3, [0]) + con.drop(3, [2]), [0, 1, 1])
    assert not obeyed(con.keep(3, [0]), [1, 1, 1])
    assert not obeyed(con.drop(3, [2]), [1, 1, 0])
    with pytest.raises(InputError, match="cannot keep block 3"):
        con.keep(3, [3])


def test_budget_by_share_and_amount():
    costs = [10.0, 20.0, 30.0, 40.0]
    share = con.budget("params", costs, share=0.3)
    assert obeyed([share], [0, 0, 1, 0])
    assert obeyed([share], [1, 1, 0, 0])
    assert not obeyed([share], [0, 1, 0, 0])
    whole = con.budget("params", costs, share=0.3, total=200.0)
    assert not obeyed([whole], [0, 0, 1, 0])
    assert obeyed([con.budget("params", costs, amount=40)], [0, 0, 0, 1])
    with pytest.raises(InputError, match="either a share or an amount"):
        con.budget("params", costs)
    with pytest.raises(InputError, match="between 0% and 100%"):
        con.budget("params", costs, share=1.5)


def test_exact_byte_budgets_survive_rounding():
    costs = np.full(7, 1e9 / 3)
    assert obeyed([con.budget("bytes", costs, share=3 / 7)], [1, 1, 1, 0, 0, 0, 0])


def test_legality_rows():
    assert obeyed([con.keep_at_least(KINDS, "attention")], [1, 1, 0, 1, 1])
    assert not obeyed([con.keep_at_least(KINDS, "attention")], [1, 0, 1, 0, 0])
    rows = con.together(5, [(0, 1), (2, 3, 4)], "period")
    assert obeyed(rows, [1, 1, 0, 0, 0])
    assert not obeyed(rows, [0, 0, 1, 1, 0])


def test_distance_counts_swaps():
    rows = [con.distance([1, 1, 0, 0, 0], 2, "apart")]
    assert obeyed(rows, [0, 0, 1, 1, 0])
    assert not obeyed(rows, [1, 0, 1, 0, 0])


def test_a_row_needs_finite_coefficients_and_a_known_sense():
    with pytest.raises(InputError, match="finite"):
        con.LinearConstraint("bad", np.array([np.nan]), "==", 0)
    with pytest.raises(InputError, match="sense"):
        con.LinearConstraint("bad", np.zeros(2), "<", 0)
