"""The Python API: the example of every public name runs, and a Run gives what its folder holds."""

import doctest
import functools
import gc
import inspect
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import isingcut
from isingcut.files.cuts import CutRecord
from isingcut.healing.heal import heal
from isingcut.models.load import load_tokenizer
from ranks import join, start
from shared import (
    load_json,
    module_fixture,
    parametrize,
    read_document,
    refuses,
    without_speed,
    write_words,
)
from tiny import edit_tensors, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("no_speed")

MEMBERS = (
    types.FunctionType,
    property,
    functools.cached_property,
    classmethod,
    staticmethod,
)
OPTIONS = {
    "samples": 4, "length": 16, "rank_samples": 4, "report_samples": 4, "dtype": "float32",
    "patch_tokens": 1000,
}  # fmt: skip


@module_fixture
def place(tmp_path_factory):
    """The working folder of the examples: my-model, my-text.txt and the finished my-run."""
    folder = tmp_path_factory.mktemp("place")
    tiny_checkpoint("llama", folder / "my-model", num_hidden_layers=10)
    write_words(folder / "my-text.txt")
    with without_speed() as patch:
        patch.chdir(folder)
        prune(out="my-run")
    return folder


def prune(remove=3, **options):
    return isingcut.prune(
        "my-model",
        **{"remove": remove, "calibration": "my-text.txt", **OPTIONS, **options},
    )


def examples(name):
    """Return the doctests of a public name and of its public members."""
    part = getattr(isingcut, name)
    holders = {name: part}
    if inspect.isclass(part):
        # doctest's own finder does not see cached properties.
        holders |= {
            f"{name}.{k}": v for k, v in vars(part).items() if isinstance(v, MEMBERS)
        }
    parser = doctest.DocTestParser()
    found = []
    for label, holder in holders.items():
        text = inspect.cleandoc(holder.__doc__ or "")
        globs = {"isingcut": isingcut, "np": np}
        found.append(parser.get_doctest(text, globs, label, None, 0))
    return [t for t in found if t.examples]


def _drop_in_a_fork(place):
    """Check that a fork that drops the run and exits leaves its temporary folder in place."""
    model = AutoModelForCausalLM.from_pretrained(place / "my-model")
    tokenizer = load_tokenizer(place / "my-model")
    text = str(place / "my-text.txt")
    run = isingcut.prune(
        model, remove=3, tokenizer=tokenizer, calibration=text, **OPTIONS
    )
    child = os.fork()
    if not child:
        del run
        gc.collect()
        raise SystemExit(0)
    os.waitpid(child, 0)
    assert len(run.at(2).spectrum) > 1
    assert run.save(place / "saved", blocks=[1]).exists()
    gone = run.path
    del run
    gc.collect()
    assert not gone.exists()


def test_a_fork_that_drops_its_run_leaves_the_original_its_folders(place, tmp_path):
    said = tmp_path / "said"
    assert join([start(said, _drop_in_a_fork, place)]) == [0], said.read_text()


def test_every_public_name_has_an_example():
    without = [name for name in isingcut.__all__ if not examples(name)]
    assert without == ["PoorEnergyWarning"], "a warning has nothing to show"


def test_every_public_member_of_a_run_has_an_example():
    shown = {t.name.removeprefix("Run.") for t in examples("Run")}
    assert {n for n in vars(isingcut.Run) if not n.startswith("_")} <= shown


@parametrize("name", [n for n in isingcut.__all__ if n != "PoorEnergyWarning"])
def test_examples_run(name, place, tmp_path, monkeypatch):
    for file in ("my-model", "my-text.txt", "my-run"):
        (tmp_path / file).symlink_to(place / file)
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    said = []
    for test in examples(name):
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_save_patches_and_distils_as_the_options_say(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    run = isingcut.open_run("my-run")
    patched = run.save(tmp_path / "patched")
    record = read_document(patched / "isingcut.json", CutRecord)
    assert record.removed == list(run.chosen.removed)
    assert record.patch.changed
    weights = (patched / "model.safetensors").read_bytes()
    # The same blocks named by hand are patched too, and no temporary folder is left.
    named = run.save(tmp_path / "named", blocks=run.chosen.removed)
    assert (named / "model.safetensors").read_bytes() == weights
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    further = prune(
        out=tmp_path / "run",
        heal=True,
        healing={"samples": 6, "length": 16, "report_samples": 4},
    )
    healed = further.save(tmp_path / "healed")
    assert (healed / "healing.json").is_file()
    assert (healed / "model.safetensors").read_bytes() != weights
    # Healing trains all weights next, so the patch is fitted and not tuned.
    fitted = read_document(tmp_path / "run/model/isingcut.json", CutRecord).patch
    assert record.patch.tuning.steps
    assert fitted.changed
    assert fitted.tuning is None


def test_a_run_outlives_a_change_of_the_working_folder(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    made = prune(out="moved-run")
    opened = isingcut.open_run("my-run"), isingcut.open_run("my-run", model="my-model")
    monkeypatch.chdir(tmp_path)
    for run in (made, *opened):
        assert run.chosen in run.candidates
        assert run.report().is_file()
        assert run.at(2).spectrum.proven
        saved = run.save(f"saved-{len(list(tmp_path.iterdir()))}", blocks=[1, 4])
        assert (tmp_path / saved / "config.json").is_file()


def test_tensors_that_no_module_uses_are_left_out_with_a_warning(
    place, tmp_path, capsys
):
    model = Path(shutil.copytree(place / "my-model", tmp_path / "rewarded"))
    with edit_tensors(model) as tensors:
        tensors |= {"v_head.weight": torch.ones(1, 8), "v_head.bias": torch.ones(1)}
    few = {
        **OPTIONS,
        "patch": "none",
        "random_states": 0,
        "calibration": place / "my-text.txt",
    }
    run = isingcut.prune(str(model), remove=1, **few)
    words = (
        "the cut has no v_head.bias, v_head.weight: "
        "the model's class does not use these tensors"
    )
    assert capsys.readouterr().err.startswith(f"isingcut: warning: {words}")
    saved = run.save(tmp_path / "saved", blocks=[1])
    assert "v_head.weight" not in load_file(saved / "model.safetensors")
    (remark,) = read_document(saved / "isingcut.json", CutRecord).proof.remarks
    assert remark.startswith(words)


def test_a_run_without_out_leaves_nothing_behind(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = prune()
    assert run.path.is_dir()
    assert run.path.is_relative_to(tmp_path)
    del run
    gc.collect()
    assert not list(tmp_path.iterdir())
    with refuses("from 1 to 9"):
        prune(10)
    assert not list(tmp_path.iterdir())


def test_all_removals_of_a_run_share_one_model(place, monkeypatch):
    monkeypatch.chdir(place)
    given = []

    def rank(runner, config):
        given.append((runner.context.loaded, config.remove))
        return runner

    monkeypatch.setattr("isingcut.runs.ranking.rank", rank)
    run = isingcut.open_run("my-run")
    assert all(one._ranked for one in (run.at(4), run.at(7)))
    assert given == [(given[0][0], "4"), (given[0][0], "7")]
    assert run.config.remove == "3"


def test_a_budget_holds_for_every_number_of_a_range(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    run = prune("2..3", out=tmp_path / "run", budget="params=5%", random_states=0)
    assert len(run.at(3).spectrum) > 1
    assert len(isingcut.open_run(tmp_path / "run", 2).spectrum) > 1


def test_a_run_without_a_removal_is_shown_with_its_blocks(place, monkeypatch):
    monkeypatch.chdir(place)
    assert (
        repr(isingcut.open_run("my-run", "")) == "<isingcut run of my-model: 10 blocks>"
    )


def test_a_poor_energy_warns_once_with_what_to_do(place, monkeypatch, stub):
    monkeypatch.chdir(place)
    found = load_json(place / "my-run/candidates.json")
    found.fidelity["kl"] = {**found.fidelity.kl, "spearman": 0.1, "spearman_low": -0.1}
    stub("isingcut.runs.ranking.rank", found)
    with pytest.warns(isingcut.PoorEnergyWarning, match=r"poorly.*--energy") as caught:
        prune(out="my-run")
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_arguments_of_another_type_are_refused_in_words(place, monkeypatch):
    monkeypatch.chdir(place)
    run = isingcut.open_run("my-run")
    whole = {"model": "my-model", "remove": 3, "calibration": "my-text.txt", **OPTIONS}
    calls = {
        "expected a path, got None": (
            lambda: isingcut.open_run(None),
            lambda: run.save(None),
        ),
        "progress must be .* got 5": (
            lambda: isingcut.open_run("my-run", progress=5),
            lambda: isingcut.prune(progress=5, **whole),
            lambda: isingcut.run(out="new", progress=5, **whole),
            lambda: isingcut.energy(out="new", progress=5, **whole),
            lambda: heal(student="s", teacher="my-model", out="new", progress=5),
        ),
        "blocks must be a list of block numbers, got": (
            lambda: run.save("new", blocks=5),
            lambda: run.save("new", blocks=[]),
            lambda: run.save("new", blocks=["1"]),
            lambda: run.save("new", blocks=[True]),
            lambda: run.save("new", blocks=[-1, 2]),
        ),
        "either a RunConfig or options by name": (lambda: isingcut.run("my-model"),),
        "either a HealConfig or options by name": (lambda: heal("my-model"),),
    }
    for words, several in calls.items():
        for call in several:
            with refuses(words):
                call()
    assert not (place / "new").exists()
