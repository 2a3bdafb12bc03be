"""Both models on WikiText-2's raw test text, in long windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from isingcut.console.progress import Progress, silent
from isingcut.data.encoder import Encoder
from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError, ModelError
from isingcut.evaluation.quality import quality
from isingcut.evaluation.questions import articles
from isingcut.files.documents.scores import TextScores
from isingcut.models.architectures import text_config
from isingcut.options.types import BATCH_TOKENS

if TYPE_CHECKING:
    from isingcut.models.load import LoadedModel


def text_scores(
    models: Mapping[str, LoadedModel],
    data: Path | None,
    samples: int | None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    length: int = 1024,
    progress: Progress = silent,
) -> TextScores:
    """Perplexity of both models on WikiText-2's raw test text, and their paired comparison.

    The articles are joined and cut into windows of ``length`` tokens, each read on its own; the
    last, short one is left out.

    Args:
        data: folder with `wikitext2/test_raw.jsonl`, one article a line.
        samples: at most so many windows.

    Raises:
        InputError: as `articles`, or shorter than one window.
    """
    assert data is not None
    original, cut = models.values()
    longest = getattr(text_config(original.model), "max_position_embeddings", None)
    size = min(length, int(longest or length))
    windows = _windows(articles(data), original, size, samples)
    try:
        found = quality(original.model, cut.model, windows, batch_tokens, progress=progress)
    except ModelError as e:
        raise ModelError(f"wikitext2: {e}") from e
    return TextScores(
        samples=windows.samples,
        tokens=windows.tokens,
        original=found.before,
        cut=found.after,
        kl=found.kl,
        kl_se=found.kl_se,
    )


def _windows(texts: Sequence[str], loaded: LoadedModel, length: int, most: int | None) -> TokenSet:
    encode = Encoder(loaded.tokenizer, loaded.model)
    ids, prefix = encode("\n".join(texts)), encode.start
    body = length - len(prefix)
    starts = range(0, len(ids) - body + 1, body)
    rows = [prefix + ids[i : i + body] for i in starts][:most]
    if not rows:
        raise InputError(f"WikiText-2's text is shorter than one window of {length} tokens")
    return TokenSet.from_rows(rows)
