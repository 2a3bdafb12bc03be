"""States with their energies and losses, and how they were found.

The documents are `spectrum.json`, `candidates.json`, `baseline-NAME.json`, and the headers of
`hamiltonian.safetensors` and `calibration.safetensors`.
"""

from typing import Annotated, Any

from pydantic import Field

from isingcut.files.schema import (
    Blocks,
    Count,
    Document,
    Number,
    Positive,
    Some,
    Strict,
)


class MeasuredLoss(Strict):
    """KL and NLL in nats per token, with standard errors over samples."""

    kl: Number
    kl_se: Positive | None
    nll: Number
    nll_se: Positive | None


class Level(Strict):
    """A state with its energy."""

    removed: Blocks
    energy: Number


class Ranked(Level):
    """A state of a spectrum."""

    rank: Count


class SpectrumFile(Document, kind="spectrum"):
    """`spectrum.json`.

    Attributes:
        searched: number of states that a search had measured; these are not in the file.
    """

    n: Annotated[int, Field(ge=1, le=2**20)]
    unit: str
    solver: str
    seconds: Positive
    proven: bool
    lower_bound: Number | None
    info: dict[str, Any]
    states: Annotated[list[Ranked], Field(min_length=1)]
    searched: Count = 0


class MeasuredState(MeasuredLoss, Level):
    """A state with its energy and its measured losses, by source if the text is a mixture.

    Attributes:
        above_lowest_se: paired standard error of its KL minus the lowest.
        patched_kl: its KL after a patch, for candidates whose KL is near the lowest.
    """

    parts: dict[str, MeasuredLoss] = {}
    above_lowest_se: Positive | None = None
    patched_kl: Number | None = None


class PatchedState(Strict):
    """The KL of a candidate after a patch."""

    position: Count
    patched_kl: Number


class ChosenState(MeasuredState):
    """The chosen state.

    Attributes:
        position: its index among the candidates.
        why: ``lowest measured KL``, ``ground``, ``patch`` or ``questions``; older files may have a
            sentence.
        compared: for ``patch``, the patched candidates, the chosen one first.
        deep: whether these were compared as in a deep cut.
    """

    position: Count
    why: str
    compared: Annotated[list[PatchedState], Field(min_length=2)] | None = None
    deep: bool = False


class Correlations(Strict):
    """Rank correlation of an energy with losses, and the ends of its interval over states."""

    n: Count
    spearman: Number | None
    spearman_low: Number | None
    spearman_high: Number | None


class Judged(Strict):
    """The correlations of one energy with each loss."""

    kl: Correlations
    nll: Correlations | None = None
    kl_random_only: Correlations | None = None


class ScoredCandidate(Strict):
    """A candidate's score on the questions, compared with the chosen candidate's."""

    removed: Blocks
    accuracy: Number | None
    certainty: Number | None
    difference: Number | None
    difference_se: Positive | None


class ByTasks(Strict):
    """A choice among candidates by questions.

    Attributes:
        tasks: names of the tasks.
        by_task: number of questions used of each task.
        questions: keys of the questions used.
    """

    by_task: dict[str, Count]
    questions: list[str]
    candidates: Annotated[list[ScoredCandidate], Field(min_length=1)]
    tasks: list[str]


class OnePassLoss(MeasuredState):
    """The blocks that a method with one pass of the original would remove, with their losses."""

    method: str


class OnePass(Strict):
    """The choices of one-pass methods, and the cost of the pass and of the search."""

    states: list[OnePassLoss]
    passes: Positive
    search_passes: Positive
    searched_for: Some


class CandidatesFile(Document, kind="candidates"):
    """`candidates.json`.

    Attributes:
        whole: if the blocks are sublayers, the best measured state of whole layers in the budget.
    """

    remove: str
    unit: str
    energy_unit: str
    samples: Some
    tokens: Some
    candidates: Annotated[list[MeasuredState], Field(min_length=1)]
    random: list[MeasuredState]
    random_tokens: Count
    random_distribution: str = ""
    fidelity: Judged
    fidelity_of_others: dict[str, Judged]
    chosen: ChosenState
    original: dict[str, Number] = {}
    proven: bool
    solver: str = ""
    one_pass: OnePass | None = None
    whole: MeasuredState | None = None
    by_tasks: ByTasks | None = None


class BaselineFile(MeasuredLoss, Document, kind="baseline"):
    """`baseline-NAME.json`."""

    baseline: str
    options: dict[str, Any] = {}
    removed: Blocks
    passes: Positive
    heads: Positive = 0.0
    tokens_searched: Count
    tokens_judged: Count = 0
    violated: list[str]
    info: dict[str, Any] = {}


class EnergyMeta(Strict):
    """The provenance of an energy, as far as isingcut reads it."""

    search: dict[str, Any] | None = None
    tokens: Count | None = None
    loss: str | None = None
    passes: Positive | None = None
    blocks_run: Count | None = None


class HamiltonianHeader(Document, kind="hamiltonian"):
    """The header of `hamiltonian.safetensors`."""

    unit: str
    meta: EnergyMeta


class CalibrationHeader(Document, kind="calibration"):
    """The header of `calibration.safetensors`."""

    source: str
    sha256: str
    meta: dict[str, Any]
