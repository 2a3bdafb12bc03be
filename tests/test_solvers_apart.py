"""A sampler that is named runs in a process of its own; nothing it does reaches this one."""

import os
import select
import sys

import numpy as np
import pytest

from isingcut.errors import InfeasibleError, InputError
from isingcut.ising import constraints as con
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import _apart, solve
from isingcut.ising.solvers._sampling import drawn

SAMPLERS = """
import os, time
from pathlib import Path
import dimod

class Low(dimod.Sampler):
    properties = {{}}
    parameters = {{"num_reads": [], "seed": [], "heat": []}}
    def sample(self, bqm, **options):
        Path({told!r}).write_text(f"{{os.getpid()}} {{sorted(options.items())}}")
        return dimod.ExactSolver().sample(bqm)

class Greedy(Low):
    def sample(self, bqm, **options):
        kept = bytearray(2**30)
        return super().sample(bqm)

class Slow(Low):
    def sample(self, bqm, **options):
        child = os.fork()
        if not child:
            time.sleep(600)
        Path({told!r}).write_text(f"{{os.getpid()}} {{child}}")
        while True:
            pass
"""


@pytest.fixture
def told(tmp_path, monkeypatch):
    file = tmp_path / "told"
    (tmp_path / "own_samplers.py").write_text(SAMPLERS.format(told=str(file)), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return file


def problem(n=8, m=3, seed=0):
    rng = np.random.default_rng(seed)
    return Problem(Hamiltonian.from_quadratic(rng.normal(size=(n, n))), [con.count(n, m)])


def test_it_gives_the_states_that_the_class_gives_in_this_process(told):
    found = solve(problem(), "dimod:own_samplers.Low", k=5, options={"heat": 2, "cold": 1})
    pid, options = told.read_text().split(" ", 1)
    assert int(pid) != os.getpid()
    assert options == "[('heat', 2), ('num_reads', 100), ('seed', 0)]"
    assert "own_samplers" not in sys.modules
    import own_samplers

    here = solve(problem(), "dimod", k=5, sampler=own_samplers.Low)
    assert told.read_text().startswith(str(os.getpid()))
    np.testing.assert_array_equal(found.states, here.states)
    np.testing.assert_array_equal(found.energies, solve(problem(), "exact", k=5).energies)
    assert found.info["ignored"] == ["cold"]
    assert here.info == {**found.info, "ignored": []}


def test_a_class_that_does_not_end_is_ended_with_all_it_started(told, monkeypatch):
    monkeypatch.setattr(_apart, "GRACE_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"Slow did not end within 0\.3 s and was ended"):
        solve(problem(), "dimod:own_samplers.Slow", seconds=0.3)
    for pid in map(int, told.read_text().split()):
        assert ended(pid), f"process {pid} lives on"


def ended(pid, seconds=60):
    """Whether a process ends by then; waits for that, and for nothing where it has."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with open(process, "rb", buffering=0) as waiting:
        return bool(select.select([waiting], [], [], seconds)[0])


def test_its_memory_is_bounded(told):
    with pytest.raises(InputError, match="Greedy failed: MemoryError"):
        solve(problem(), "dimod:own_samplers.Greedy", memory_mb=500)
    assert solve(problem(), "dimod:own_samplers.Greedy", memory_mb=4000).removed()


def test_no_module_of_the_working_folder_is_imported(told, tmp_path, monkeypatch):
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "numpy.py").write_text(
        f"import os; os.mkdir({str(trap / 'sprung')!r})", encoding="utf-8"
    )
    monkeypatch.chdir(trap)
    assert len(solve(problem(), "dimod:own_samplers.Low", k=1)) == 1
    assert not (trap / "sprung").exists()


def test_an_infeasible_problem_is_one_here_too(told):
    clash = problem().with_constraints(con.drop(8, range(4)))
    with pytest.raises(InfeasibleError, match="clash"):
        solve(clash, "dimod:own_samplers.Low")
    assert not told.exists()


def test_a_problem_arrives_as_it_was_sent(tmp_path):
    sent = problem().with_constraints([con.budget("params", np.arange(1.0, 9), share=0.2)])
    _apart._write_problem(sent, tmp_path)
    found = _apart._read_problem(tmp_path)
    np.testing.assert_array_equal(found.hamiltonian.J, sent.hamiltonian.J)
    np.testing.assert_array_equal(found.hamiltonian.h, sent.hamiltonian.h)
    for a, b in zip(found.constraints, sent.constraints, strict=True):
        assert (a.name, a.sense, a.rhs) == (b.name, b.sense, b.rhs)
        np.testing.assert_array_equal(a.coefficients, b.coefficients)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((3, 8), dtype=np.float64), "float64"),
        (np.zeros((3, 7), dtype=np.bool_), r"\(3, 7\)"),
        (np.zeros(8, dtype=np.bool_), "expected bool"),
        (np.zeros((4000, 8), dtype=np.bool_), "expected at most"),
        (np.array([{}], dtype=object), "cannot be read"),
        (b"no array", "cannot be read"),
    ],
)
def test_states_from_the_other_process_are_plain_arrays_or_refused(tmp_path, content, message):
    file = tmp_path / "states.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    with pytest.raises(InputError, match=message):
        _apart._read_states(file, "x.Y", 5, 8)


def test_options_that_json_does_not_have_need_the_class_itself(told):
    with pytest.raises(InputError, match="give the class itself"):
        solve(problem(), "dimod:own_samplers.Low", options={"heat": object()})


class Exits:
    """Raises in the middle of this process's work."""

    def __init__(self, error):
        self.error = error

    def sample(self, bqm):
        raise self.error


def test_what_an_object_raises_is_one_error_but_an_interrupt_is_the_users():
    with pytest.raises(InputError, match=r"the sampler Exits failed: SystemExit: 3"):
        drawn(problem(), 1, Exits(SystemExit(3)), {}, 1.0, "Exits")
    with pytest.raises(KeyboardInterrupt):
        drawn(problem(), 1, Exits(KeyboardInterrupt()), {}, 1.0, "Exits")
