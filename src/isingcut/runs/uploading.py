"""Upload a cut checkpoint to the Hugging Face Hub, with its model card."""

import json
import re
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from yaml import YAMLError

from isingcut.data.mixture import without_folders
from isingcut.errors import InputError, StageFileError, one_line
from isingcut.files.cuts import CutRecord
from isingcut.files.inputs import load_json
from isingcut.files.ownership import refuse_changed
from isingcut.files.results import read_document
from isingcut.healing import RECORD as HEALING
from isingcut.report.card import hub_results
from isingcut.report.run_files import RunFiles
from isingcut.runs.folder import RunFolder

_LOGIN = "log in with: hf auth login (or set HF_TOKEN to a token with write access)"
# Versions of the hub library use different HTTP libraries, with different base classes.
_TransportError = cast(type[Exception], HfHubHTTPError.__mro__[1])

_UPLOADED = re.compile(
    r".*\.safetensors|.*\.safetensors\.index\.json|README\.md|"
    r"(tokenizer|special_tokens_map|added_tokens|vocab|chat_template)\.json|vocab\.(txt|bpe)|"
    r"merges\.txt|.*\.(model|tiktoken|py)|(additional_chat_templates/)?[^/]*\.jinja|"
    r"(license|licence|notice|use_policy|copying)[^/]*",
    re.IGNORECASE,
)
"""The files of a checkpoint besides its configurations and records; no others are uploaded."""
RECORDS = ("isingcut.json", HEALING)
"""The records of isingcut, which are uploaded without private paths."""
_PATH_KEYS = re.compile(r"_?name_or_path|.*_(file|path|dir)")
"""Keys of configurations in which other programs leave a path of their machine."""

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
        raise InputError(f"{one_line(e)}; write owner/name") from e
    read_document(checkpoint / "isingcut.json", CutRecord)
    files: Files = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        name = path.relative_to(checkpoint).as_posix()
        if name in RECORDS or name.endswith("config.json"):
            files[name] = _clean(path, name)
        elif _UPLOADED.fullmatch(name):
            files[name] = path
    try:
        card = ModelCard.load(checkpoint / "README.md")
    except (OSError, ValueError, YAMLError) as e:
        raise InputError(
            f"{checkpoint}/README.md is no model card ({one_line(e)})"
        ) from e
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


def _clean(path: Path, name: str) -> Path | bytes:
    """Return a JSON file of a checkpoint without what is private: folders, and the command line."""
    content = load_json(path, "the checkpoint's", StageFileError, infinite=True)
    if name in RECORDS:
        cleaned = without_folders(content)
        cleaned.get("provenance", {}).pop("command_line", None)
    else:
        paths = {k: v for k, v in content.items() if _PATH_KEYS.fullmatch(k)}
        cleaned = content | without_folders(paths)
    if cleaned == content:
        return path
    return f"{json.dumps(cleaned, indent=2, ensure_ascii=False)}\n".encode()


def read_records(files: Files) -> dict[str, Any]:
    """Return the content of isingcut's records among the files that `prepare` returned."""
    return {
        name: json.loads(file if isinstance(file, bytes) else file.read_bytes())
        for name, file in files.items()
        if name in RECORDS
    }


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
        raise InputError(
            f"uploading to {repository} failed ({one_line(e)}); {hint}"
        ) from e
    return str(made.url)
