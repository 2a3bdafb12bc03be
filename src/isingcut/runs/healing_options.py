"""How a run heals, and whether it may: looked at before anything is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

CHOICE = "healed-candidates.json"
HEALED = "healed"


def wanted(config: RunConfig) -> bool:
    """Whether a run heals at all."""
    return config.heal or config.patch != "none"


def heal_config(config: RunConfig) -> HealConfig:
    """Healing options of a run: those of `heal_options`, and what the run itself says.

    Raises:
        InputError: an option that the run sets, or one that does not exist.
    """
    values = from_yaml(HealConfig, user_path(config.heal_options)) if config.heal_options else {}
    set_by_run = {"student", "teacher", "out", "patch", "device", "trust_remote_code", "overwrite"}
    set_by_run |= {"other_teacher"}
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
    if found.text == "self":
        raise InputError(
            "healing needs real text; name some in a file given as --heal-options (text: FILE)"
        )
    if found.text == config.calibration and only_once(found.text):
        raise InputError(
            f"healing needs more of the text than was measured on, but {found.text} is a pipe, "
            "which can be read once; write it into a file, or name another text in a file given "
            "as --heal-options (text: FILE)"
        )
    return found.replace(
        patch=config.patch,
        method=found.method if config.heal else "none",
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    ).validate()


def check(session: Session) -> None:
    """Refuse before anything is written what healing would refuse at the end."""
    config = session.config
    if not wanted(config):
        return
    check_training(heal_config(config))
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
