"""Tiny random models of every family, and tiny checkpoints with a tokenizer, all offline."""

from __future__ import annotations

from isingcut.testing.tiny import tiny_checkpoint, tiny_model, tiny_tokenizer

__all__ = ["tiny_checkpoint", "tiny_model", "tiny_tokenizer"]
