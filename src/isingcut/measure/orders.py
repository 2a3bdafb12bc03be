"""What rank 0 tells the others, as bytes: a safetensors file, so that nothing is ever unpickled."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from isingcut.data.tokens import TokenSet

_TEXT = "message"


def pack(message: dict[str, Any], arguments: dict[str, Any]) -> bytes:
    """A message, and the arguments of a call: token sets, arrays, lists, plain values."""
    plain: dict[str, Any] = {}
    arrays: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, TokenSet):
            for field in dataclasses.fields(value):
                arrays[f"{name}.{field.name}"] = getattr(value, field.name).numpy()
        elif isinstance(value, np.ndarray | list | tuple):
            arrays[f"{name}."] = np.asarray(value)
        else:
            plain[name] = value
    text = json.dumps({"message": message, "plain": plain}).encode()
    whole = {_TEXT: np.frombuffer(text, dtype=np.uint8)}
    return bytes(save(whole | {k: np.ascontiguousarray(v) for k, v in arrays.items()}))


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `pack` packed."""
    import torch

    arrays = load(data)
    text = json.loads(arrays.pop(_TEXT).tobytes())
    arguments: dict[str, Any] = dict(text["plain"])
    sets: dict[str, dict[str, torch.Tensor]] = {}
    for name, array in arrays.items():
        owner, _, field = name.partition(".")
        if field:
            sets.setdefault(owner, {})[field] = torch.from_numpy(array.copy())
        else:
            arguments[owner] = array
    return text["message"], arguments | {k: TokenSet(**parts) for k, parts in sets.items()}
