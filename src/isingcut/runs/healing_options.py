"""How a run patches and heals, and whether it may: looked at before anything is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isingcut.data.mixture import places_in
from isingcut.data.text_files import only_once
from isingcut.errors import InputError
from isingcut.files.inputs import user_path
from isingcut.healing.checks import check_training
from isingcut.models.processes import launched
from isingcut.options.config import RunConfig
from isingcut.options.declaration import from_yaml, options_from
from isingcut.options.healing import HealConfig
from isingcut.runs.removal import each_removal

if TYPE_CHECKING:
    from isingcut.runs.session import Session

HEALED = "healed"


def heal_config(config: RunConfig) -> HealConfig:
    """Healing options of a run: those of `heal_options`, and what the run itself says.

    Raises:
        InputError: an option that the run sets, or one that does not exist.
    """
    values = from_yaml(HealConfig, user_path(config.heal_options)) if config.heal_options else {}
    set_by_run = {"student", "teacher", "out", "device", "trust_remote_code", "overwrite"}
    set_by_run |= {"other_teacher", "patch", "patch_tokens", "effort"}
    taken = sorted(set_by_run & values.keys())
    if taken:
        raise InputError(
            f"{config.heal_options}: {', '.join(taken)} is set by the run itself; leave it out"
        )
    base = {
        "text": config.calibration,
        "seed": config.seed,
        "dtype": config.dtype,
        **({"batch_tokens": config.batch_tokens} if config.batch_tokens else {}),
    }
    found = options_from(HealConfig, {**base, **values}, config.heal_options or "healing")
    return found.replace(
        patch="none" if config.patch == "none" else None,
        patch_tokens=config.patch_tokens,
        method=found.method if config.heal else "none",
        effort="" if config.heal == "all" else config.heal,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def patch_config(config: RunConfig) -> HealConfig:
    """The same for the patch of the checkpoint that is cut, which `--heal` trains on from."""
    return heal_config(config).replace(patch="linear" if config.heal else config.patch)


def distil_config(config: RunConfig) -> HealConfig:
    """The same for what follows the patch of the checkpoint that was cut.

    Raises:
        InputError: options that exclude each other.
    """
    return heal_config(config).replace(patch="none").validate()


def check_options(config: RunConfig) -> None:
    """Refuse healing options that cannot work, before any model is read.

    Raises:
        InputError: as `heal_config`, or a text that cannot be healed with.
    """
    if config.heal:
        _check_text(config, distil_config(config))
    elif config.patch != "none":
        heal_config(config)


def check(session: Session) -> None:
    """Refuse before anything is written what healing would refuse at the end.

    The patch alone is refused nowhere: where it cannot be, the run says so and goes on.
    """
    config = session.config
    if not config.heal:
        return
    healing = heal_config(config)
    check_training(healing)
    if len(each_removal(config)) > 1:
        raise InputError(
            "a run over a range of removals cuts no checkpoint, so there is none to heal; "
            "give one number with --remove"
        )
    if launched():
        raise InputError(
            "healing inside a run is done by one process; heal the cut model afterwards with: "
            "torchrun ... -m isingcut heal"
        )
    if session.streaming:
        raise InputError(
            "a model that is streamed from disk cannot be healed in the run: training needs the "
            "weights in memory; heal the cut model with `isingcut heal` on a larger machine"
        )


def _check_text(config: RunConfig, healing: HealConfig) -> None:
    sources = places_in(healing.text)
    if "self" in sources:
        raise InputError(
            "healing needs real text; name some in a file given as --heal-options (text: FILE)"
        )
    measured = places_in(config.calibration)
    if pipes := [source for source in sources if source in measured and only_once(source)]:
        raise InputError(
            f"healing needs more of the text than was measured on, but {pipes[0]} is a pipe, "
            "which can be read once; write it into a file, or name another text in a file given "
            "as --heal-options (text: FILE)"
        )
