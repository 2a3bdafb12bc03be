"""The verbs, each a stage or several, in the order of `isingcut --help`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isingcut.cli.verb import (
    LOOK,
    OF_RUN,
    RESULT,
    STAGES,
    WHOLE,
    Blocks,
    ConfigFile,
    Folder,
    Output,
    collect,
    removal_at,
    reopen,
    reopen_at,
    verb,
)
from isingcut.errors import InputError
from isingcut.files.results import read_document
from isingcut.healing import RECORD
from isingcut.options.config import RunConfig
from isingcut.options.declaration import read_options
from isingcut.options.heal import HealConfig
from isingcut.processes import Processes, is_launched, launched_rank

if TYPE_CHECKING:
    from isingcut.cli import show
    from isingcut.files.evaluations import BenchmarksFile, EvaluationFile
    from isingcut.report import words
    from isingcut.runs import (
        benchmarking,
        cutting,
        evaluating,
        pipeline,
        ranking,
        solving,
    )
else:

    class LazyModule:
        """A module that is imported on first use, so that `--help` stays fast."""

        def __init__(self, name: str) -> None:
            self.name = f"isingcut.{name}"

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self.name), attribute)

    show = LazyModule("cli.show")
    words = LazyModule("report.words")
    benchmarking = LazyModule("runs.benchmarking")
    cutting = LazyModule("runs.cutting")
    evaluating = LazyModule("runs.evaluating")
    pipeline = LazyModule("runs.pipeline")
    ranking = LazyModule("runs.ranking")
    solving = LazyModule("runs.solving")

_ALL = RunConfig.__dataclass_fields__


@verb(*_ALL, group=WHOLE, together=True)
def run(progress: Any, config: ConfigFile = None, **options: Any) -> Output:
    """Measure, solve, rank, cut, patch, evaluate and report.

    Example: isingcut run smollm2 --remove 6 --out my-run
    """
    wanted = collect(RunConfig, config, options)
    _check_early(wanted, "isingcut.run")
    target = pipeline.run(wanted, progress=progress)
    if not wanted.remove.is_range:
        return _make_output(target)

    data = {"folder": str(target), "curve": show.curve_data(target)}
    return Output(data, lambda: show.show_curve(target), brief=str(target))


def _check_early(config: RunConfig, source: str) -> None:
    """Check a whole job before torch is imported; the job checks it again."""
    from isingcut.runs import checks

    # Under a launcher, an error of rank 0 must reach the others, which have to be joined first.
    if not is_launched():
        ranks = source == "isingcut.run"
        checks.check_inputs(checks.check_options(config, {}, source), ranks=ranks)


@verb("out", "overwrite", group=WHOLE, together=True)
def demo(progress: Any, **options: Any) -> Output:
    """Remove 3 of the 30 blocks of SmolLM2-135M and show the results, in a few minutes.

    Example: isingcut demo
    """
    return _make_output(pipeline.demo(**options, progress=progress), generation=True)


def _make_output(target: Path, *, generation: bool = False) -> Output:
    files = show.open_finished(target)
    return Output(
        show.run_data(files),
        lambda: show.show_run(files, generation=generation),
        brief=files.verdict if files.removed is None else str(files.product),
        warnings=files.warnings,
    )


@verb(
    "model",
    *OF_RUN[1:],
    *("units", "keep", "must_remove", "out", "calibration", "energy"),
    "compare_energies",
    *("samples", "length", "rank_samples", "report_samples", "seed", "effort"),
    *("dtype", "attention", "batch_tokens"),
    group=STAGES,
    together=True,
)
def energy(progress: Any, config: ConfigFile = None, **options: Any) -> Output:
    """Measure the Hamiltonian once, so that `solve` takes seconds for any removal.

    With --remove or --budget, also search near that removal.

    Example: isingcut energy smollm2 --out my-run
    """
    from isingcut.files.store import Store

    wanted = collect(RunConfig, config, options)
    _check_early(wanted, "isingcut.energy")
    folder = pipeline.energy(wanted, progress=progress)
    data = show.energy_data(folder)
    text = Store.open(folder).run.provenance.calibration
    file = data["hamiltonian"]
    assert text is not None
    warnings = [*words.overlap_warnings(text.overlap), *words.repeat_warnings(text)]
    return Output(data, lambda: show.show_energy(data), brief=file, warnings=warnings)


@verb(
    *("solver", "states", "budget", "keep", "must_remove"),
    "overwrite",
    group=STAGES,
)
def solve(
    directory: Folder,
    progress: Any,
    remove: Annotated[
        list[str] | None,
        typer.Option(
            metavar="M",
            help="How many blocks to remove: 6, 4..15 for a curve, or attention=2,mlp=1.",
        ),
    ] = None,
    **options: Any,
) -> Output:
    """Find the low-energy states of a measured Hamiltonian, for any number of blocks.

    Example: isingcut solve my-run --remove 4 --remove 8 --remove 12
    """
    from isingcut.runs.folder import each_removal, model_warnings
    from isingcut.runs.stages import Runner

    solved = []
    typed = [read_options(RunConfig, {"remove": removal}) for removal in remove or ()]
    for one in typed or [{}]:
        folder, combined = reopen(directory, options | one, several=True)
        for config in each_removal(combined):
            spectrum = solving.solve(Runner.of_files(folder, progress), config)
            file = folder.target(config.removal) / "spectrum.json"
            solved.append((config.removal, spectrum, file))

    def show_all() -> None:
        for removal, spectrum, file in solved:
            show.show_spectrum(spectrum, removal, file)

    removals = [
        {"removal": removal, "file": str(file), **spectrum.to_dict()}
        for removal, spectrum, file in solved
    ]
    meta = solving.read_energy(folder).meta
    return Output(
        {"removals": removals},
        show_all,
        brief="\n".join(str(file) for *_, file in solved),
        warnings=[
            *words.search_warnings(meta, [removal for removal, *_ in solved]),
            *model_warnings(folder),
        ],
    )


@verb(
    "random_states",
    "choose",
    "tasks",
    "data",
    "questions",
    *OF_RUN,
    group=STAGES,
    together=True,
)
def rank(directory: Folder, progress: Any, **options: Any) -> Output:
    """Measure the candidates, choose one, and compare the energy's ranking on random states.

    Example: isingcut rank my-run --remove 8
    """
    folder, config = reopen(directory, options)
    if options.keys() & {"tasks", "data", "questions"} and config.choose != "tasks":
        raise InputError(
            "--tasks, --data and --questions are for --choose tasks; to score a checkpoint, type: "
            "isingcut evaluate"
        )
    runner = pipeline.open_again(folder, config, progress, Processes.join())
    ranked = ranking.rank(runner, config)
    file = folder.target(config.removal) / "candidates.json"
    return Output(
        {"file": str(file), **show.CUT_ON_RANKING, **ranked.content()},
        lambda: show.show_ranking(ranked),
        brief=",".join(map(str, ranked.chosen.removed)),
        warnings=words.ranking_warnings(config.energy, ranked),
    )


@verb(*OF_RUN, group=STAGES, together=True)
def baseline(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A method; `isingcut ls` lists all.",
        ),
    ],
    directory: Folder,
    progress: Any,
    **options: Any,
) -> Output:
    """Choose blocks by a published method on the run's text, and measure them for comparison.

    Example: isingcut baseline sleb my-run --remove 8
    """
    from isingcut.baselines import registry

    # Check the typed name before the run folder.
    registry.get(name)
    folder, config = reopen(directory, options)
    runner = pipeline.open_again(folder, config, progress, Processes.join())
    choice = ranking.compare(runner, config, name)
    file = folder.target(config.removal) / f"baseline-{name}.json"
    return Output(
        {"file": str(file), **show.CUT_ON_RANKING, **choice.content()},
        lambda: show.show_baseline(choice, file),
        brief=str(file),
    )


@verb("patch", "patch_tokens", "patch_share", "drop_mtp", *OF_RUN, group=STAGES)
def excise(
    directory: Folder,
    progress: Any,
    blocks: Blocks = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also cut this GGUF of the same model, to model.gguf (default: the run's own).",
        ),
    ] = None,
    **options: Any,
) -> Output:
    """Write the chosen state as a plain Hugging Face checkpoint, patched and verified.

    Examples: isingcut excise my-run --remove 8;
    isingcut excise my-run --blocks 3,4,9
    """
    from isingcut.files.cuts import CutRecord

    folder, config, removed = reopen_at(directory, options, blocks)
    runner = pipeline.open_again(folder, config, progress)
    if gguf is not None:
        cutting.check_gguf(runner.context, folder, gguf)
    model = cutting.make_model(runner, config, removed)
    packed = cutting.make_gguf(runner, config, model, gguf)
    record = read_document(model / "isingcut.json", CutRecord)
    remarks = record.proof.remarks if record.proof else []
    lines = [str(path) for path in (model, packed) if path]
    return Output(
        {
            "removed": record.removed,
            "checkpoint": str(model),
            "gguf": packed and str(packed),
        },
        lambda: show.show_lines(*lines),
        brief=lines[0],
        warnings=[*remarks, *words.patch_warnings(record)],
    )


@verb(*HealConfig.__dataclass_fields__, group=RESULT, of=HealConfig, together=True)
def heal(progress: Any, config: ConfigFile = None, **options: Any) -> Output:
    """Recover quality of a cut checkpoint: a closed-form patch, then distillation.

    Interrupted? Run the same command again to resume. Several processes:
    torchrun --nproc-per-node 2 -m isingcut heal ...

    Example: isingcut heal my-run/model --train 10min --out healed
    """
    from isingcut.files.healings import HealingFile
    from isingcut.healing.checks import check_inputs

    wanted = collect(HealConfig, config, options)
    inputs = [config] if config else []
    check_inputs(wanted, inputs)
    # Imported last, because it imports torch.
    from isingcut.healing.heal import heal as run_heal

    folder = run_heal(wanted, progress=progress, sources=inputs)
    if launched_rank():
        # Only rank 0 prints the result.
        raise typer.Exit
    healing = read_document(folder / RECORD, HealingFile)
    return Output(
        {"checkpoint": str(folder), **healing.content()},
        lambda: show.show_healing(healing, folder),
        brief=str(folder),
        warnings=words.healing_warnings(healing),
    )


@verb("tasks", "data", "questions", "prompts", *OF_RUN, group=STAGES)
def evaluate(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A run folder; or a checkpoint or .gguf file."
        ),
    ],
    progress: Any,
    original: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare the checkpoint or .gguf file with this model.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --original: file for the scores."),
    ] = None,
    blocks: Blocks = None,
    **options: Any,
) -> Output:
    """Compare the original and the final model on unseen text, and their speed.

    With --tasks, compare them on benchmarks only.

    Examples: isingcut evaluate my-run --tasks arc_easy,piqa --data questions --questions 500;
    isingcut evaluate another-cut --original my-model
    """
    from isingcut.files.store import Store
    from isingcut.formats.sources import check_name
    from isingcut.report.run_files import RunFiles
    from isingcut.runs.checks import check_run_tasks

    names = ("tasks", "data", "questions", "prompts")
    typed = {name: options.pop(name) for name in names if name in options}
    asked = RunConfig(model=original or "of the run", **typed).validate()
    check_run_tasks(asked)
    if asked.tasks and asked.prompts:
        raise InputError(
            "--tasks and --prompts write different files; type a command for each"
        )
    if original is None and directory.suffix.lower() == ".gguf":
        raise InputError(
            f"{directory} is a .gguf file; give its original with --original, or the folder "
            "of its run"
        )
    if original is not None:
        for name in ("model", "remove", "budget", "blocks"):
            if name in options or (name == "blocks" and blocks is not None):
                raise InputError(
                    f"--{name} is for a run folder, --original for a checkpoint; use one"
                )
        config = asked.replace(**options)
        check_name(original, trust_remote_code=config.trust_remote_code)
        if not config.tasks:
            scores, file = evaluating.evaluate_checkpoint(config, directory, out)
            return _output_scores(scores, {"file": str(file)})
        rows, file = benchmarking.benchmark_checkpoint(config, directory, out)
        return _output_benchmarks(rows, file, "cut", {})
    if out is not None:
        raise InputError(
            "--out needs --original; a run folder has its own benchmarks.json"
        )
    if (directory / "config.json").is_file() and not Store.exists(directory):
        raise InputError(
            f"{directory} is a checkpoint, not a run folder; add --original MODEL to compare it "
            "with its original"
        )
    folder, config, removed = reopen_at(directory, options, blocks)
    if typed:
        config = config.replace(**{name: getattr(asked, name) for name in names})
    runner = pipeline.open_again(folder, config, progress)
    target = cutting.product(folder, config, removed).parent
    output = {"file": str(target / "evaluation.json"), "split": "report"}
    if not asked.tasks:
        scores = evaluating.evaluate(runner, config, removed)
        evaluating.rewrite_card(folder, target)
        return _output_scores(scores, output)
    rows = benchmarking.benchmarks(runner, config, removed)
    evaluating.rewrite_card(folder, target)
    file = target / "benchmarks.json"
    if not rows.rows:
        raise benchmarking.failed_error(rows.failed)
    files = RunFiles(folder, target)
    before = {} if files.evaluation is None else output | files.evaluation.content()
    return _output_benchmarks(rows, file, files.last, before)


def _output_scores(scores: EvaluationFile, file: dict[str, str]) -> Output:
    pairs = scores.answers.pairs if scores.answers else []
    answered = show.answered_data(pairs, scores.last or "GGUF")
    return Output(
        file | scores.content() | answered,
        lambda: show.show_evaluation(scores),
        brief=f"{scores.kl:.4f}",
        warnings=[
            *words.paragraphs("harm_words", scores),
            *words.patch_warnings(scores),
        ],
    )


def _output_benchmarks(
    rows: BenchmarksFile, file: Path, last: str, before: dict[str, Any]
) -> Output:
    answered = show.answered_data(rows.endings, last)
    return Output(
        before | {"benchmarks": {"file": str(file), **rows.content()}} | answered,
        lambda: show.show_benchmarks(rows, file, last),
        brief=str(file),
        warnings=words.patch_warnings(rows),
    )


@verb("remove", "budget", "overwrite", group=STAGES)
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="A run folder; several give one comparison page."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The comparison page (default: compare.html)."
        ),
    ] = None,
    **options: Any,
) -> Output:
    """Write report.html, report.md and report.json, or one page that compares several runs.

    Example: isingcut report my-run
    Example: isingcut report my-run other-run --out compare.html
    """
    from isingcut.report.run_files import RunFiles
    from isingcut.report.write import write_comparison
    from isingcut.runs.folder import model_warnings

    alone = len(directories) == 1
    if out is not None and alone:
        raise InputError("--out is for the comparison page; give two or more DIRs")
    removals = [removal_at(directory, options, alone) for directory in directories]
    if alone:
        folder, target = removals[0]
        file = solving.report(folder, target)
        page = str(file.with_suffix(".html"))
        return Output(
            {"report": str(file), "html": page},
            lambda: show.show_lines(page, str(file)),
            brief=str(file),
            warnings=model_warnings(folder) + RunFiles(folder, target).outdated,
        )
    whole = out or Path("compare.html")
    warnings = write_comparison(
        removals, whole, overwrite=bool(options.get("overwrite"))
    )
    return Output(
        {"comparison": str(whole), "folders": [str(target) for _, target in removals]},
        lambda: show.show_lines(str(whole)),
        brief=str(whole),
        warnings=warnings,
    )


_PLACING = (
    *("dtype", "device", "memory_limit", "cards_per_process", "trust_remote_code"),
    "units",
)


@verb("model", *_PLACING, name="inspect", group=LOOK)
def inspect_blocks(**options: Any) -> Output:
    """Show a model's blocks, their costs and which states are legal, without reading its weights.

    Example: isingcut inspect smollm2
    """
    from isingcut.formats.sources import resolve

    config = RunConfig(**options).validate()
    source = resolve(
        config.model, trust_remote_code=config.trust_remote_code, weights=False
    )
    # Imported last, because it imports torch.
    from isingcut.models.inspect import inspect_model

    model = inspect_model(source, **{name: getattr(config, name) for name in _PLACING})
    data = show.inspection_data(model)
    blocks = str(len(model.stack))
    return Output(data, lambda: show.show_inspection(model), brief=blocks)


@verb(*_ALL, group=LOOK)
def plan(**options: Any) -> Output:
    """Estimate the time and memory of each energy and stage from a timed forward pass.

    Example: isingcut plan smollm2 --remove 6
    """
    from isingcut.formats.sources import locate

    config = RunConfig(**options).validate()
    locate(config.model, trust_remote_code=config.trust_remote_code, weights=False)
    plan = pipeline.make_plan(config)
    brief = f"{plan['seconds']:.0f}"
    return Output(plan, lambda: show.show_plan(plan), brief=brief)


@verb(name="ls", group=LOOK)
def list_parts() -> Output:
    """List the energies, solvers, baselines, repairs, metrics and benchmark tasks.

    Example: isingcut ls
    """
    from isingcut.baselines import registry as baselines
    from isingcut.energies import registry as energies
    from isingcut.evaluation.metrics import registry as metrics
    from isingcut.evaluation.questions import task_names
    from isingcut.healing.repairs import registry as repairs
    from isingcut.ising.solvers import registry as solvers

    rooms = (energies, solvers, baselines, repairs, metrics)
    parts = {r.room: r.names() for r in rooms}
    parts["tasks"] = task_names()
    lines = [f"{room}: {', '.join(names)}" for room, names in parts.items()]
    return Output(parts, lambda: show.show_lines(*lines), brief="\n".join(lines))
