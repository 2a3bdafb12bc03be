"""Upload a cut checkpoint to the Hugging Face Hub, with its model card."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from yaml import YAMLError

from isingcut.errors import InputError, first_line
from isingcut.files.cuts import CutRecord
from isingcut.files.ownership import MARKER, refuse_changed
from isingcut.files.results import read_document
from isingcut.report.card import hub_results
from isingcut.report.run_files import RunFiles
from isingcut.runs.folder import RunFolder

_LOGIN = "log in with: hf auth login (or set HF_TOKEN to a token with write access)"
# Versions of the hub library use different HTTP libraries, with different base classes.
_TransportError = cast(type[Exception], HfHubHTTPError.__mro__[1])

Files = dict[str, Path | bytes]
"""Files by their names in the repository: a path, or the content."""


def prepare(
    checkpoint: Path, repository: str, folder: RunFolder | None = None
) -> tuple[ModelCard, Files]:
    """Return the model card and all files, card included, that `push` uploads; without network.

    Args:
        checkpoint: a folder that `isingcut excise` or `Run.save` wrote.
        repository: ``"owner/name"``, or ``"name"`` for a repository of yours.
        folder: the run of the checkpoint. Its results then are in the card's metadata, and its
            `model.gguf` and that file's card are among the files.

    Raises:
        StageFileError, InputError: ``checkpoint`` was not written by isingcut, a file other than
            Markdown was changed since, the model card has no valid metadata, or the hub does not
            allow the repository's name.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as e:
        raise InputError(f"{first_line(e)}; write owner/name") from e
    read_document(checkpoint / "isingcut.json", CutRecord)
    # The marker has a meaning on this machine only.
    found = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MARKER)
    files: Files = {p.relative_to(checkpoint).as_posix(): p for p in found}
    try:
        card = ModelCard.load(checkpoint / "README.md")
    except (OSError, ValueError, YAMLError) as e:
        raise InputError(f"{checkpoint}/README.md is no model card ({first_line(e)})") from e
    if folder is None:
        refuse_changed(checkpoint)
    else:
        folder.check(checkpoint)
        run = RunFiles(folder.path, checkpoint.parent)
        card.data.model_name = repository.rpartition("/")[2]
        card.data.eval_results = hub_results(run) or None
        if run.gguf is not None:
            folder.check(run.gguf)
            packed = (run.gguf, run.gguf.with_suffix(".gguf.md"))
            files |= {p.name: p for p in packed if p.is_file()}
    files["README.md"] = str(card).encode()
    return card, files


def push(
    files: Files,
    repository: str,
    *,
    private: bool = False,
    message: str = "",
    endpoint: str | None = None,
) -> str:
    """Upload a cut checkpoint; create the repository if it does not exist.

    Uses the token of `hf auth login` or ``HF_TOKEN``, which is never read or shown here.

    Args:
        repository: ``"owner/name"``, or ``"name"`` for a repository of yours.
        private: create the repository as private; an existing one does not change.
        message: the commit message.
        endpoint: another hub than the default.

    Returns:
        the URL of the repository.

    Raises:
        InputError: the hub refused the repository's name or the token, or cannot be reached.
    """
    api = HfApi(endpoint=endpoint, library_name="isingcut")
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(
            made.repo_id,
            [CommitOperationAdd(name, file) for name, file in files.items()],
            commit_message=message or "Blocks removed by isingcut",
        )
    except (OSError, ValueError, _TransportError) as e:
        status = getattr(getattr(e, "response", None), "status_code", None)
        refused = isinstance(e, LocalTokenNotFoundError) or status in (401, 403)
        hint = _LOGIN if refused else "check the name (owner/name), then run again"
        raise InputError(f"uploading to {repository} failed ({first_line(e)}); {hint}") from e
    return str(made.url)
