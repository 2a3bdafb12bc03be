"""Stages `calibration` and `energy`: text to token splits, token splits to Hamiltonians."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from isingcut.data.calibration import Calibration, build
from isingcut.data.corpora import refuse_changed, text_hashes
from isingcut.data.mixture import places_in
from isingcut.data.tokens import TokenSet
from isingcut.energies import registry
from isingcut.energies.search import Target
from isingcut.errors import InputError
from isingcut.files.runs import BlockList, CalibrationText, SplitSize
from isingcut.files.store import Store
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.options.search import SearchOptions
from isingcut.options.text import TextOptions
from isingcut.runs.constraints import removal_rows
from isingcut.runs.context import Context
from isingcut.runs.folder import each_removal
from isingcut.runs.prices import Prices
from isingcut.runs.stages import Estimate, Inputs, Planned, Runner, stage


def energy_part(config: SearchOptions, name: str) -> Any:
    """Create the energy called ``name`` with its options."""
    part = registry.get(name)
    own = {f.name for f in dataclasses.fields(part)}
    if config.effort and "effort" not in own and name == config.energy:
        raise InputError(
            f"--effort is an option of 'refined' and 'auto', not of {name!r}"
        )
    given = {"effort": config.effort, "seed": config.seed}
    return part(**{key: value for key, value in given.items() if key in own})


def samples_of(config: SearchOptions, name: str) -> int:
    """Return the samples for an energy: `--samples` for the main one, else the energy's default."""
    if name == config.energy and config.samples is not None:
        return config.samples
    return int(energy_part(config, name).default_samples)


def _samples(config: SearchOptions) -> int:
    """Return the samples of the energy split: the maximum over energies; each uses the first."""
    return max(samples_of(config, name) for name in config.energies)


def _check_streaming(config: SearchOptions) -> None:
    """Raise early if an option needs the whole model in memory."""
    for name in config.energies:
        if not getattr(energy_part(config, name), "streams", True):
            raise InputError(
                f"the energy {name!r} needs all blocks in memory and cannot be streamed; use "
                "'pairwise', 'fisher' or 'empirical-fisher', or pass --stream off on a machine "
                "with enough memory"
            )
    if "self" in places_in(config.calibration):
        raise InputError(
            "--calibration self would read a streamed model from disk for every token; choose a "
            "text, or pass --stream off on a machine with enough memory"
        )


def build_calibration(context: Context, config: SearchOptions) -> Calibration:
    """Build the token splits of a run, without writing them."""
    if context.streaming:
        _check_streaming(config)
    return _build(context, config, _samples(config))


def _build(context: Context, config: TextOptions, samples: int) -> Calibration:
    counts = samples + config.rank_samples + config.report_samples
    return build(
        config.calibration,
        context.loaded.sampler(
            config.length,
            config.seed,
            tokens=counts * config.length,
            progress=context.progress,
        ),
        samples=samples,
        rank_samples=config.rank_samples,
        report_samples=config.report_samples,
        progress=context.progress,
    )


def calibrate(runner: Runner, config: SearchOptions, built: Calibration | None) -> None:
    """Write the token splits to `calibration.safetensors`, and describe them in `run.json`."""
    text = calibration(runner, config, built)
    folder = runner.folder
    folder.run.provenance.calibration = CalibrationText(
        source=text.source,
        sha256=text.sha256,
        splits={k: _size(split) for k, split in text.splits.items()},
        overlap=text.meta.get("overlap", {}),
        repeats=text.meta.get("repeats", {}),
    )
    folder.save()


def _plan_calibration(
    runner: Runner, config: SearchOptions, built: Calibration | None
) -> Planned:
    folder = runner.folder
    file = folder.path / "calibration.safetensors"
    texts: dict[str, Any] = {}
    if built is not None:
        texts = built.meta["texts"]
    elif not folder.processes.rank:
        # The recorded hashes of files that are missing now.
        record = folder.find_finished(file)
        known = record.options.texts if record else {}
        if not folder.overwrite:
            refuse_changed(known, config.calibration)
        places = [p for p in places_in(config.calibration) if p in known]
        texts = {place: known[place] for place in places}
        texts |= text_hashes(config.calibration)
    samples = _samples(config)
    return Planned(file, {"energy_samples": samples, "texts": texts, "built": built})


@stage("calibration", Calibration.load, plan=_plan_calibration)
def calibration(context: Context, inputs: Inputs, options: Any, out: Path) -> None:
    built = options.built or _build(context, options, options.energy_samples)
    built.save(out)


def _size(split: TokenSet) -> SplitSize:
    """Count samples and predictions of a split, and of each source of a mixture."""
    rows = split.rows_by_part
    size = SplitSize(samples=split.samples, tokens=split.tokens)
    if rows:
        size.parts = {name: _size(split.select(own)) for name, own in rows.items()}
    return size


def measure_energy(runner: Runner, config: SearchOptions) -> Hamiltonian:
    """Measure every energy of the options, and return the main one."""
    energies = [energy(runner, config, name) for name in config.energies]
    return energies[0]


def energy_file(folder: Store, config: SearchOptions, name: str) -> Path:
    """Return the file of an energy."""
    own = "" if name == config.energy else f".{name}"
    return folder.path / f"hamiltonian{own}.safetensors"


def _check_removals(context: Context, config: SearchOptions, blocks: BlockList) -> None:
    """Raise if a removal is impossible; `pack` checks a budget for a packed model."""
    if not config.budget.packed:
        targets_of(blocks, config)


def price_energy(prices: Prices, name: str) -> Estimate:
    """Estimate one energy, with its default number of samples unless the options set it."""
    part = energy_part(prices.config, name)
    samples = prices.config.samples or part.default_samples
    if prices.streamed and not getattr(part, "streams", True):
        why = "needs the whole model in memory"
        return Estimate(name, samples, impossible=why)
    if not hasattr(part, "price"):
        return Estimate(name, samples, impossible="not estimated")
    sizes = prices.config.remove.counts or [prices.remove]
    priced = prices.measurement(samples, part.price(prices.n, sizes))
    return dataclasses.replace(priced, name=name)


def _plan_energy(runner: Runner, config: SearchOptions, name: str) -> Planned:
    folder = runner.folder
    part = energy_part(config, name)
    searched = hasattr(part, "targets")
    if searched:
        targets = targets_of(folder.run.blocks, config)
        part = dataclasses.replace(part, targets=targets)
    return Planned(
        energy_file(folder, config, name),
        {
            "energy": name,
            "measured_samples": samples_of(config, name),
            "settings": repr(part),
            "searched": searched,
            "part": part,
        },
    )


@stage(
    "energy",
    Hamiltonian.load,
    plan=_plan_energy,
    check=_check_removals,
    price=lambda prices: [price_energy(prices, e) for e in prices.config.energies],
)
def energy(context: Context, inputs: Inputs, options: Any, out: Path) -> None:
    samples = range(options.measured_samples)
    split = (
        inputs.read("calibration", Calibration.load).splits["energy"].select(samples)
    )
    work = context.work(inputs.place / f"{inputs.file.name}.journal")
    options.part.measure(context.replay, split, work).save(out)


def targets_of(blocks: BlockList, config: SearchOptions) -> tuple[Target, ...]:
    """Return the targets of a search: every removal in the options."""
    if not config.removal:
        return ()
    return tuple(
        Target(one.removal, removal_rows(blocks, one)) for one in each_removal(config)
    )
