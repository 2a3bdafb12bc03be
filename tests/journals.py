"""Journals as kills and failing disks leave them."""

from __future__ import annotations

from pathlib import Path


def count_rows(path: Path) -> int:
    """How many rows a journal has."""
    return path.read_bytes().count(b"\n")


def keep_rows(path: Path, rows: int, *, torn: int = 0) -> None:
    """Leave the first rows, and after them some that lack their end."""
    head, *lines = path.read_bytes().split(b"\n")
    cut = [line[:-3] for line in lines[rows : rows + torn]]
    path.write_bytes(b"\n".join([head, *lines[:rows], *cut]))
