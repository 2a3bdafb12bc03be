"""Several processes: the same bits as one, one report of a failure, and no process left behind."""

import os
import signal
import sys
from contextlib import nullcontext

import torch

import ranks
from cards import fake_cards
from isingcut.files.journal import Journal
from isingcut.measure.losses import Piece, divide
from ranks import join, lines_of, start, type_in
from shared import (
    flags,
    load_json,
    module_fixture,
    parametrize,
    save_json,
    works,
    write_words,
)
from tiny import count_rows, tiny_checkpoint

OPTIONS = {
    "samples": 6, "length": 16, "rank_samples": 4, "report_samples": 3, "dtype": "float32",
    "batch_tokens": 32, "attention": "sdpa",
}  # fmt: skip


def _place(folder, **sizes):
    """Write a tiny model and a text to a folder."""
    tiny_checkpoint("llama", folder / "model", **sizes)
    write_words(folder / "text.txt", 2500)
    return folder


@module_fixture
def place(tmp_path_factory):
    """A folder with a tiny model and a text."""
    return _place(tmp_path_factory.mktemp("distributed"))


@module_fixture
def alone(place):
    """Results of a single process."""
    _measure(place, place)
    return place


def _typed(place, out, name="pairwise", also=True):
    """Return a measurement as a command line."""
    given = {"model": place / "model", "calibration": place / "text.txt", "out": out}
    if also and name == "pairwise":
        given["compare_energies"] = "empirical-fisher"
    if name == "refined":
        given["remove"] = 2
    return ["energy", *flags({**OPTIONS, **given, "energy": name})]


def _measure(place, out):
    """Measure three energies, and rank for one."""
    for arguments in (
        _typed(place, out / "pairwise"),
        ["solve", out / "pairwise", "--remove", 2, "--states", 5],
        ["rank", out / "pairwise", "--remove", 2, "--random-states", 30],
        _typed(place, out / "fisher", "fisher"),
        _typed(place, out / "refined", "refined"),
    ):
        works(*arguments)


def _all(place, out, notes):
    """Measure in every process, and note which rows each computed."""
    computed = []
    put = Journal.put

    def noted(journal, rows):
        computed.extend(rows)
        put(journal, rows)

    Journal.put = noted
    _measure(place, out)
    save_json(notes.with_name(f"{notes.name}.{os.environ['RANK']}"), computed)


def test_three_processes_give_the_bits_of_one(place, alone, tmp_path):
    out = tmp_path / "run"
    notes = tmp_path / "notes"
    ranks.run([0, 0, 0], notes.with_suffix(".err"), _all, place, out, notes)
    for name in (
        "pairwise/calibration.safetensors",
        "pairwise/hamiltonian.safetensors",
        "pairwise/hamiltonian.empirical-fisher.safetensors",
        "pairwise/remove-2/candidates.json",
        "fisher/hamiltonian.safetensors",
        "refined/hamiltonian.safetensors",
    ):
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
    others = [load_json(tmp_path / f"notes.{r}") for r in (1, 2)]
    assert all(others), "every process has computed a part"
    said = notes.with_suffix(".err").read_text()
    assert said.count("measuring 21 removals: done") == 1, "one process shows progress"


def assert_as_alone(alone, out):
    """Check that a run has the energy of a single process."""
    name = "hamiltonian.safetensors"
    assert (out / name).read_bytes() == (alone / "pairwise" / name).read_bytes()


def _launcher(*words):
    """Run accelerate's launcher here, where torch is loaded; it starts an interpreter per rank."""
    from accelerate.commands.launch import main

    # The same number of threads as here gives the same sums.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    sys.argv = ["accelerate-launch", *words]
    main()


def test_a_launcher_starts_all_processes(place, alone, tmp_path):
    """The launcher is accelerate's, whose last step is torchrun's."""
    out = tmp_path / "run"
    said = tmp_path / "said"
    command = [
        "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "-m", "isingcut", *_typed(place, out, also=False),
    ]  # fmt: skip
    assert join([start(said, _launcher, *map(str, command))]) == [0], said.read_text()
    assert said.read_text().count("2 processes share the measurements") == 1
    assert_as_alone(alone, out)


def _fisher_and_run(place, out, given):
    """Measure one energy, and do a whole run with another, with further options."""
    with fake_cards(4) if "--device" in given else nullcontext():
        works(*_typed(place, out / "fisher", "fisher"), *given)
        whole = {
            "patch": "linear",
            "patch_tokens": 256,
            "states": 3,
            "random_states": 0,
        }
        _, *energy = _typed(place, out / "whole", "refined")
        works("run", *energy, *flags(whole), "--skip-speed", *given)


@parametrize(
    "one, each, said",
    [
        (["--stream=on"], ["--stream=on"], '"stream": "on"'),
        (
            ["--device", "lazy:0"],
            ["--device", "lazy", "--cards-per-process=2"],
            '"lazy:0,lazy:1"',
        ),
    ],
)
def test_processes_that_stream_or_have_two_cards_agree(one, each, said, tmp_path):
    """The ranking of the run measures losses as the pair energy does."""
    place = _place(tmp_path, num_hidden_layers=4)
    _fisher_and_run(place, tmp_path / "alone", one)
    ranks.run([0, 0], tmp_path / "said", _fisher_and_run, place, tmp_path / "two", each)
    for name in (
        "fisher/hamiltonian.safetensors",
        "whole/hamiltonian.safetensors",
        "whole/candidates.json",
        "whole/model/model.safetensors",
    ):
        alone, two = (tmp_path / k / name for k in ("alone", "two"))
        assert alone.read_bytes() == two.read_bytes(), name
    for name in ("fisher", "whole"):
        assert said in (tmp_path / "two" / name / "run.json").read_text()


def _picks(place, out, found):
    """Note the dtype each of two processes loads if only rank 0's CPU is fast in bfloat16."""
    from isingcut.models import load as models

    rank = os.environ["RANK"]
    load = models.load
    torch.cpu.get_capabilities = lambda: {"amx_bf16": rank == "0"}

    def noted(*arguments, **options):
        loaded = load(*arguments, **options)
        found.with_name(f"{found.name}.{rank}").write_text(str(loaded.dtype))
        return loaded

    models.load = noted
    type_in(*_typed(place, out, "fisher"), "--dtype", "auto")


def test_all_processes_compute_in_the_dtype_that_rank_0_picks(place, tmp_path):
    ranks.run(
        [0, 0], tmp_path / "said", _picks, place, tmp_path / "run", tmp_path / "dtype"
    )
    picked = [(tmp_path / f"dtype.{r}").read_text() for r in (0, 1)]
    assert picked == ["torch.bfloat16", "torch.bfloat16"]


def _fails(arguments, meeting=None):
    """Let rank 1 fail with an error of isingcut in the middle of a measurement.

    With ``meeting`` the ranks wait for each other there, or rank 0 may finish before rank 1 begins.
    Without, rank 0 computes for any time.
    """
    import isingcut.measure.losses as module
    from isingcut.errors import ArchitectureError

    measured = module._measure

    def broken(*given):
        if os.environ["RANK"] == "1":
            if meeting:
                meeting.open("w").close()
            raise ArchitectureError("this block cannot be run")
        if not meeting:
            signal.pause()
        meeting.open().close()
        module._measure = measured
        return measured(*given)

    module._measure = broken
    type_in(*arguments)


def test_an_error_anywhere_ends_all_with_one_line(place, tmp_path):
    said = tmp_path / "said"
    meeting = tmp_path / "meeting"
    os.mkfifo(meeting)
    ranks.run([2, 2], said, _fails, _typed(place, tmp_path / "run"), meeting)
    assert lines_of(said) == ["isingcut: rank 1 of 2: this block cannot be run"]
    assert "Traceback" not in said.read_text()
    assert not list((tmp_path / "run").glob(".*")), "no half-written files"


def _killed(place, out, which):
    """Kill one of two processes while it stores its first row."""
    if os.environ["RANK"] == str(which):
        Journal.put = lambda journal, rows: os.kill(os.getpid(), signal.SIGKILL)
    type_in(*_typed(place, out, also=False))


@parametrize("which", [0, 1])
def test_a_killed_process_ends_all_and_the_run_goes_on_with_another_number(
    which, place, alone, tmp_path
):
    said = tmp_path / "said"
    out = tmp_path / "run"
    codes = [-signal.SIGKILL, 1]
    ranks.run(codes[:: -1 if which else 1], said, _killed, place, out, which)
    lines = lines_of(said)
    # Only rank 0 prints lines; if it was killed itself, there are none.
    assert len(lines) == which
    assert all("the 2 processes lost contact (" in line for line in lines)
    assert not list(out.glob(".*")), "no half-written files"
    works(*_typed(place, out, also=False))
    assert_as_alone(alone, out)


def _agent(function, arguments):
    """Run torchrun's agent with ranks that are forks of this process."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    words = ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    config, *_ = config_from_args(parse_args([*words, "none"]))
    config.start_method = "fork"
    elastic_launch(config, function)(*arguments)


def _torchrun(said, function, *arguments):
    """Let two processes fail under torchrun's agent; return the lines that they print."""
    assert join([start(said, _agent, function, arguments)]) == [1]
    return lines_of(said)


def test_the_reason_of_another_process_is_printed_while_rank_0_computes(
    place, tmp_path
):
    arguments = _typed(place, tmp_path / "run", also=False)
    lines = _torchrun(tmp_path / "said", _fails, arguments)
    assert lines == ["isingcut: rank 1 of 2: this block cannot be run"]


def _dies(meeting, arguments):
    """Kill rank 1 while rank 0 computes; each has stored a row."""
    put = Journal.put

    def watched(journal, rows):
        put(journal, rows)
        if os.environ["RANK"] == "1":
            meeting.open("w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        meeting.open().close()
        signal.pause()  # stands for a computation of any length

    Journal.put = watched
    type_in(*arguments)


def test_a_launcher_ends_a_run_that_lost_a_process_with_one_line(
    place, alone, tmp_path, spy
):
    out = tmp_path / "run"
    meeting = tmp_path / "meeting"
    os.mkfifo(meeting)
    arguments = _typed(place, out, also=False)
    (line,) = _torchrun(tmp_path / "said", _dies, meeting, arguments)
    assert "stopped by a signal; launchers send one" in line
    journals = [out / f"hamiltonian.safetensors.journal{end}" for end in ("", ".1")]
    # Each process has kept one half of the first micro-batch, the original included.
    assert list(map(count_rows, journals)) == [11, 11]
    measured = spy(Journal, "put", lambda _, journal, rows: [*rows])
    works(*_typed(place, out, also=False))
    assert measured == [[f"{batch}:{state}" for state in range(22)] for batch in (1, 2)]
    assert_as_alone(alone, out)
    assert not list(out.glob("*.journal*"))


@parametrize("count", [1, 2, 3, 4, 7, 16])
def test_pieces_cover_every_missing_state_once(count):
    pieces = [(0, range(5, 20)), (1, [0, 1, 2, 9, 10, 11]), (4, [7])]
    missing = [Piece(None, None, *piece) for piece in pieces]
    parts = divide(missing, count, 0.03)
    found = [(part.batch, place) for part in parts for place in part.places]
    assert found == [(batch, place) for batch, places in pieces for place in places]
    assert all(part.places for part in parts)


def test_few_micro_batches_are_parted_for_many_processes():
    def whole(batches, states):
        return [Piece(None, None, b, range(states)) for b in range(batches)]

    assert divide(whole(2, 100), 1, 0.03) == whole(2, 100)
    assert len(divide(whole(2, 100), 4, 0.03)) == 4
    assert len(divide(whole(64, 100), 4, 0.03)) == 64
    # Even without states, the original's own losses are needed.
    assert divide(whole(1, 1), 4, 0.03) == whole(1, 1)
    assert divide([], 4, 0.03) == []
