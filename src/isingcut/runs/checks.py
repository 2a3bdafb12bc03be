"""Check a run's options, folder, model name and text before torch is imported.

The command line calls these checks first, so that a mistake is answered at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isingcut.data import corpora
from isingcut.data.conversations import Messages, read_prompts
from isingcut.data.mixture import places_in
from isingcut.data.text_files import is_read_once
from isingcut.energies import registry as energies
from isingcut.errors import InputError
from isingcut.evaluation.metrics import registry as metrics
from isingcut.evaluation.questions import check_tasks, split_names
from isingcut.files.inputs import user_path
from isingcut.files.store import Store
from isingcut.formats.sources import check_name
from isingcut.healing.repairs import registry as repairs
from isingcut.ising.solvers import registry as solvers
from isingcut.options.choose import ChoiceOptions
from isingcut.options.config import RunConfig
from isingcut.options.declaration import options_from
from isingcut.options.judge import JudgeOptions
from isingcut.options.search import Search
from isingcut.processes import is_launched
from isingcut.runs.folder import model_places, refuse_foreign
from isingcut.runs.stages import refuse_changes


def check_options(
    config: RunConfig | None, options: Mapping[str, Any], source: str
) -> RunConfig:
    """Check the options of a whole job, given as a `RunConfig` or by name.

    Args:
        source: the name of the call, for messages.
    """
    if config is not None and (options or not isinstance(config, RunConfig)):
        raise InputError(
            "give either a RunConfig or options by name (model=...), not both"
        )
    config = (config or options_from(RunConfig, options, source)).validate()
    if not config.out:
        raise InputError("--out is missing; give a folder for the run")
    if not config.removal and source != "isingcut.energy":
        raise InputError(
            "--remove is missing; give how many blocks to remove, or a --budget"
        )
    if config.budget.packed and source != "isingcut.run":
        raise InputError(
            f"--budget {config.budget} is only for `isingcut run`; give --remove M"
        )
    resolved = resolve_energy(config)
    for name in resolved.energies:
        energies.check(name)
    return resolved


def resolve_energy(config: Search) -> Search:
    """Replace the energy `auto` in the options by the chosen one, so that files have its name."""
    if config.energy != "auto":
        return config
    return config.replace(energy="refined" if config.removal else "pairwise")


def check_inputs(config: RunConfig, *, ranks: bool) -> None:
    """Check the run folder, the model's name, the text and the tasks of a whole job.

    Args:
        ranks: whether the job ranks removals, or measures the energy only.

    Raises:
        IsingcutError: the job would fail later.
    """
    refuse_foreign(config)
    path = user_path(config.out)
    if Store.exists(path):
        before = Store.open(path, overwrite=config.overwrite)
        model_places(before, config.model)
        refuse_changes(before, config, ranks=ranks)
    else:
        # Check before any file is opened, which could get the descriptor of a closed pipe.
        corpora.check(config.calibration)
    solvers.check(config.solver)
    repairs.check(config.patch)
    # Every evaluation measures all.
    for name in metrics.names():
        metrics.get(name)
    check_healing_options(config)
    check_run_tasks(config)
    # Last, because the name may be one of the hub.
    check_name(config.model, trust_remote_code=config.trust_remote_code)


def check_healing_options(config: RunConfig) -> None:
    """Check healing options before any model is read.

    Raises:
        InputError: as `RunConfig.training`, an unsuitable text, or a job that cannot heal.
    """
    training = config.training()
    if not config.heal:
        return
    sources = places_in(training.text)
    measured = places_in(config.calibration)
    if "self" in sources:
        raise InputError(
            "healing needs real text; name some with --healing '{text: SOURCE}'"
        )
    for source in sources:
        if source in measured and is_read_once(source):
            raise InputError(
                f"healing needs further text, but {source} is a pipe and can be read only once; "
                "save it to a file, or name another text with --healing '{text: SOURCE}'"
            )
    if config.remove.is_range:
        raise InputError(
            "a run over a range of removals cuts no checkpoint, so --heal has none; give one "
            "number with --remove"
        )
    if is_launched():
        raise InputError(
            "healing inside a run supports one process only; heal the cut model afterwards with: "
            "torchrun ... -m isingcut heal"
        )


def check_run_tasks(config: ChoiceOptions) -> None:
    """Check the tasks and prompts of a run's options before a model is loaded.

    Raises:
        IsingcutError: as `questions.check_tasks` and `prompts_of`, or they do not fit the run.
    """
    if config.prompts and config.remove.is_range:
        raise InputError(
            "--prompts needs a checkpoint, but a range of removals cuts none; omit it"
        )
    prompts_of(config)
    if not config.tasks:
        return
    if config.choose != "tasks" and config.remove.is_range:
        raise InputError(
            "--tasks needs a checkpoint, but a range of removals cuts none; omit it"
        )
    names = split_names(config.tasks)
    check_tasks(names, data_of(config), config.questions)


def prompts_of(config: JudgeOptions) -> list[Messages]:
    """Return the user's prompts in a run's options.

    Raises:
        IsingcutError: as `conversations.read_prompts`.
    """
    file = config.prompts
    return read_prompts(file, user_path(file)) if file else []


def data_of(config: JudgeOptions) -> Path | None:
    """Return the folder of the questions in a run's options."""
    return user_path(config.data) if config.data else None
