"""Upload a cut checkpoint to the Hugging Face Hub, with its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from isingcut.errors import InputError, first_line
from isingcut.files.documents import CutRecord
from isingcut.files.writing import MARKER, read_document

_LOGIN = "log in with: hf auth login (or set HF_TOKEN to a token with write access)"


def push(
    checkpoint: Path,
    repository: str,
    *,
    private: bool = False,
    message: str = "",
    endpoint: str | None = None,
) -> str:
    """Upload a cut checkpoint; create the repository if it does not exist.

    Uses the token of `hf auth login` or ``HF_TOKEN``, which is never read or shown here.

    Args:
        checkpoint: a folder that `isingcut excise` or `Run.save` wrote.
        repository: ``"owner/name"``, or ``"name"`` for a repository of yours.
        private: create the repository as private; an existing one does not change.
        message: the commit message; by default it names the removed blocks.
        endpoint: another hub than the default.

    Returns:
        the URL of the repository.

    Raises:
        StageFileError: ``checkpoint`` was not written by isingcut.
        InputError: the hub refused the repository's name or the token, or cannot be reached.
    """
    record = read_document(checkpoint / "isingcut.json", CutRecord)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # Versions of the hub library use different HTTP libraries, with different base classes.
    transport_error = cast(type[Exception], HfHubHTTPError.__mro__[1])
    api = HfApi(endpoint=endpoint, library_name="isingcut")
    words = message or f"{len(record.removed)} of {record.of} blocks removed by isingcut"
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=checkpoint,
            repo_id=made.repo_id,
            commit_message=words,
            ignore_patterns=[MARKER],
        )
    except (OSError, ValueError, transport_error) as e:
        # Also for a card with invalid YAML or UTF-8.
        status = getattr(getattr(e, "response", None), "status_code", None)
        refused = isinstance(e, LocalTokenNotFoundError) or status in (401, 403)
        hint = _LOGIN if refused else "check the name (owner/name), then run again"
        raise InputError(
            f"uploading {checkpoint} to {repository} failed ({first_line(e)}); {hint}"
        ) from e
    return str(made.url)


def list_files(checkpoint: Path) -> list[dict[str, Any]]:
    """List name and size of every file that `push` would upload, without network access."""
    # The marker has a meaning on this machine only.
    found = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MARKER)
    return [
        {"name": p.relative_to(checkpoint).as_posix(), "bytes": p.stat().st_size} for p in found
    ]
