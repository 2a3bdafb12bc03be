"""All options of a run, composed of those of its parts.

    text -> search -> solve -> choose
    text -> patch  -> choose, heal
    judge -> choose;  machine -> heal

The command line, `run.yaml` and Python all use these declarations and these defaults. A function
takes the part that it reads; `RunConfig` is all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isingcut.errors import InputError
from isingcut.options.choose import LEAST_STATES, ChoiceOptions
from isingcut.options.declaration import option
from isingcut.options.heal import HealingOptions

QUICK: dict[str, Any] = {
    "samples": 8,
    "length": 128,
    "rank_samples": 8,
    "report_samples": 16,
    "states": 8,
    "random_states": 0,
    "patch_tokens": 16384,
}
"""Values that `quick` sets for options with their default value."""


@dataclass(frozen=True, init=False)
class RunConfig(ChoiceOptions, HealingOptions):
    """The options of one run; every field is also a CLI option and a key of `run.yaml`.

    Examples:
        >>> config = isingcut.RunConfig(model="my-model", remove="3")
        >>> config.replace(keep="0").energy
        'auto'
    """

    out: str = option("", "Folder for the run; every stage writes its file there.")
    quick: bool = option(
        False,
        "Take a first look in about a quarter of the time: less text, a shorter search, a smaller "
        "patch. The figures are marked as rough.",
    )
    overwrite: bool = option(False, "Replace an existing output.")

    def __init__(self, **values: Any) -> None:
        if isinstance(heal := values.get("heal"), bool):
            values["heal"] = "all" if heal else ""
        super().__init__(**values)
        for name, value in QUICK.items() if self.quick else ():
            if getattr(self, name) == self.__dataclass_fields__[name].default:
                object.__setattr__(self, name, value)
        if 0 < self.random_states < LEAST_STATES:
            raise InputError(
                f"--random-states must be 0 or at least {LEAST_STATES}, got {self.random_states}"
            )
        if both := {*self.keep.numbers} & {*self.must_remove.numbers}:
            raise InputError(
                f"--keep and --must-remove both name block {min(both)}; remove it from one"
            )

    def validate(self) -> RunConfig:
        """Check that these options fit together, and return them.

        Raises:
            InputError: no model, a missing option that another needs, or options that exclude
                each other.
        """
        if not self.model:
            raise InputError(
                "MODEL is missing; give a folder, a hub id, a .gguf file or 'smollm2'"
            )
        if self.budget.packed and (self.remove or self.must_remove):
            what = "--remove" if self.remove else "--must-remove"
            raise InputError(
                f"--budget {self.budget} chooses the blocks to remove; omit {what}"
            )
        if not self.tasks and (self.choose == "tasks" or self.data or self.questions):
            raise InputError(
                "--choose tasks, --data and --questions need benchmarks; name some with --tasks"
            )
        return self
