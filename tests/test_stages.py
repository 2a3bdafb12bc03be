"""What the declarations of stages promise, for each stage and option."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import yaml

import isingcut
from isingcut.files.stages import NUMERICS, STAGES, Declaration
from isingcut.files.store import Store
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.options.config import RunConfig
from isingcut.options.declaration import option, options_of
from isingcut.options.parsed import QUANTITIES, Quantity
from isingcut.runs import pipeline, ranking, stages
from isingcut.runs.constraints import removal_rows
from isingcut.runs.folder import read_config
from shared import (
    OutputExistsError,
    StageFileError,
    load_json,
    module_fixture,
    parametrize,
    refuses,
    run_tiny,
    without_speed,
    write_jsonl,
    write_words,
)

# Another value of each option that a result may depend on.
OTHER = yaml.safe_load("""
samples: 4
length: 24
rank_samples: 4
report_samples: 4
seed: 1
energy: fisher
compare_energies: empirical-fisher
effort: "99"
keep: "0"
must_remove: "3"
solver: tabu
states: 6
random_states: 31
choose: ground
patch: none
patch_tokens: 900
patch_share: 0.25
drop_mtp: true
healing: {samples: 5, length: 16, report_samples: 4, seed: 3}
heal: 99tokens
questions: 3
dtype: bfloat16
attention: eager
batch_tokens: 48
device: cpu
stream: "off"
memory_limit: 9GB
cards_per_process: 1
""")
# The options that the values of a stage are found from.
FOUND_FROM = yaml.safe_load("""
energy_samples: [samples, compare_energies]
energy: [energy]
measured_samples: [samples]
settings: [effort, seed, energy, keep, must_remove]
compared: [compare_energies]
repair: [patch]
unseen: [healing, seed]
training: [heal, healing, patch_tokens, seed, dtype, batch_tokens]
""")
# Only tasks that choose are read by the ranking, and it reads these options of `solve` with the
# spectrum. Only a text that the model writes depends on how it computes.
# A baseline has no settings of the energy.
NOT_HERE = {
    "rank": {"keep", "must_remove"},
    "calibration": {*NUMERICS},
    "baseline": {"energy", "effort", "keep", "must_remove"},
}
NAMES = [
    "calibration",
    "energy",
    "solve",
    "rank",
    "baseline",
    "cut",
    "heal",
    "evaluate",
    "benchmarks",
]
GIVEN = {
    "calibration": [None],
    "energy": ["refined"],
    "baseline": ["block-influence"],
}
ALL = {stage.name: stage for stage in pipeline.STAGES}


@module_fixture
def finished(shared, tmp_path_factory):
    place = tmp_path_factory.mktemp("stages")
    question = {"context": "ab", "choices": ["a", "b"], "answer": 0}
    with without_speed():
        out = run_tiny(
            shared.checkpoint(),
            write_words(place / "text.txt"),
            place / "run",
            remove=2,
            heal="40tokens",
            healing={"samples": 6, "length": 16, "report_samples": 4},
            tasks=write_jsonl(place / "mine.jsonl", [question] * 4),
        )
        folder = Store.open(out)
        runner = pipeline.open_again(folder, read_config(folder))
        ranking.compare(runner, read_config(folder), "block-influence")
        yield out


def plan(runner, config, name):
    """Return what a stage writes and the options that it writes it with."""
    stage = ALL[name]
    planned = stages.Planned(runner.folder.target(config.removal) / stage.declared.main)
    if stage.plan:
        planned = stage.plan(runner, config, *GIVEN.get(name, []))
    return planned, planned.config or config


def opened(path, name):
    """Return a run folder, its runner, and what `plan` returns for a stage."""
    folder = Store.open(path)
    config = read_config(folder)
    runner = pipeline.open_again(folder, config)
    return folder, runner, *plan(runner, config, name)


@parametrize("option", OTHER)
def test_an_option_makes_again_what_declares_it_and_nothing_else(finished, option):
    folder = Store.open(finished)
    config = read_config(folder).replace(**{option: OTHER[option]})
    runner = pipeline.open_again(folder, config)
    expected = set()
    found = set()
    for name in NAMES:
        declared = STAGES[name]
        reads = {*options_of(config, name), *(NUMERICS if declared.numerics else ())}
        reads = reads.union(*(FOUND_FROM.get(v, ()) for v in declared.values))
        if name == "benchmarks":
            reads |= {"questions"}
        if option in reads - NOT_HERE.get(name, set()):
            expected.add(name)
        try:
            planned, own = plan(runner, config, name)
            options = ALL[name]._options(runner, own, planned)
        except StageFileError:
            # It needs another result first, which is made again.
            found.add(name)
            continue
        if not folder.is_made(planned.file, options):
            found.add(name)
    assert found == expected


@parametrize("name", NAMES)
def test_a_stage_is_made_again_with_each_result_that_it_reads(finished, name):
    for read in STAGES[name].reads:
        folder, runner, planned, own = opened(finished, name)
        assert folder.is_made(planned.file, ALL[name]._options(runner, own, planned))
        source = folder.find_source(planned.file, read)
        if read == "choice":
            folder.record(source).chosen = [0, 1]
        else:
            folder.record(source).fingerprint = "0"
        assert folder.find_outdated(planned.file).value in (read, "model")
        if read != "choice":
            options = ALL[name]._options(runner, own, planned)
            assert not folder.is_made(planned.file, options), read


@parametrize("name", NAMES)
def test_a_stage_cannot_read_what_it_does_not_declare(finished, tmp_path, name):
    _, runner, planned, own = opened(finished, name)
    seen = []
    probe = dataclasses.replace(ALL[name], make=lambda *given: seen.append(given))
    probe._make(runner, own, planned, tmp_path / "out")
    ((context, inputs, options, _),) = seen
    declared = STAGES[name]
    free = {*stages._HOW, *planned.values, *(NUMERICS if declared.numerics else ())}
    for field in dataclasses.fields(RunConfig):
        if field.name in options_of(own, name) or field.name in free:
            getattr(options, field.name)
        else:
            with pytest.raises(LookupError, match=f"{name} reads {field.name}, which"):
                getattr(options, field.name)
    for read in {"calibration", "energy", "spectrum", "model"} - {*declared.reads}:
        with pytest.raises(LookupError, match="which it does not declare"):
            inputs.find(read)
    if not declared.model:
        with pytest.raises(LookupError, match="reads loaded, which"):
            _ = context.loaded


def results(folder):
    """Return the bits of all results, without the times that they took."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes()
        elif name in ("candidates.json", "model/isingcut.json", "benchmarks.json"):
            found[name] = load_json(path)
    return found


def test_a_kill_after_each_stage_and_before_its_record_changes_no_bit(
    finished, tmp_path, monkeypatch
):
    given = isingcut.open_run(finished).config
    kills = set()
    save = Store.save

    def kill_once(self):
        done = [key for key, record in self.run.stages.items() if record.done]
        for when in ("before", "after"):
            if when == "after":
                save(self)
            if done and (done[-1], when) not in kills:
                kills.add((done[-1], when))
                raise KeyboardInterrupt

    monkeypatch.setattr(Store, "save", kill_once)
    config = given.replace(out=str(tmp_path / "run"))
    while True:
        try:
            pipeline.run(config)
            break
        except KeyboardInterrupt:
            continue
    assert len(kills) == 2 * (len(NAMES) - 1)
    assert results(tmp_path / "run") == results(finished)


def test_a_new_option_has_two_places(finished, tmp_path):
    """The options class that declares it, and the stage that reads it."""

    @dataclasses.dataclass(frozen=True, init=False)
    class Seasoned(RunConfig):
        salt: int = option(0, "Grains of salt.", stages="solve")

    seen = []
    stage = dataclasses.replace(
        ALL["solve"], make=lambda context, inputs, options, out: seen.append(options)
    )
    folder = Store.open(finished)
    runner = stages.Runner.of_files(folder)
    for salt in (0, 1):
        config = Seasoned(**vars(read_config(folder)), salt=salt)
        planned = stage.plan(runner, config)
        assert stage._options(runner, config, planned)["salt"] == salt
        stage._make(runner, config, planned, tmp_path / "spectrum.json")
        assert seen.pop().salt == salt


def test_a_new_stage_has_two_places(finished, tmp_path, monkeypatch):
    """Its declaration, and the function that makes its result."""
    folder = Store.open(Path(shutil.copytree(finished, tmp_path / "run")))
    declared = Declaration("count", "count.txt", reads=("energy",), model=False)
    declared = dataclasses.replace(declared, numerics=False)
    monkeypatch.setitem(STAGES, "count", declared)
    made = []

    @stages.stage("count", Path.read_text)
    def count(context, inputs, options, out):
        made.append(out)
        out.write_text(str(inputs.read("energy", Hamiltonian.load).n))

    runner = stages.Runner.of_files(folder)
    assert [count(runner, read_config(folder)) for _ in range(2)] == ["6", "6"]
    assert len(made) == 1
    assert folder.find_outdated(made[0]) is None
    folder.record(folder.path / "hamiltonian.safetensors").fingerprint = 16 * "0"
    assert folder.find_outdated(made[0]).value == "energy"
    with refuses(
        "count.txt was made with other .*the energy changed", OutputExistsError
    ):
        count(runner, read_config(folder))


def test_a_new_budget_has_one_place(finished, monkeypatch):
    """The table of quantities, for a cost that the blocks have."""
    monkeypatch.setitem(
        QUANTITIES, "active", Quantity("active_parameters", "", {"%": 0.01}, "%")
    )
    folder = Store.open(finished)
    config = read_config(folder).replace(remove="", budget="active=30%")
    row = removal_rows(folder.run.blocks, config)[1]
    costs = [block.active_parameters for block in folder.run.blocks.blocks]
    assert row.coefficients.tolist() == costs
    assert row.rhs == pytest.approx(0.3 * sum(costs))
