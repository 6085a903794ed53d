"""What makes two runs the same run: model, tokens, configuration, versions. A run is resumed as what it was."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from trsp_fast.errors import UserError

SAMPLED = 4096  # elements of each weight that are hashed as they are; all of them count in a sum

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> str:
    """Tells models apart by every parameter's name, dtype, shape and bits, reading each weight once on its device."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        bits = parameter.detach().reshape(-1).view(_INTEGERS[parameter.element_size()])
        stride = max(1, len(bits) // SAMPLED)
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)} {int(bits.sum(dtype=torch.int64))}".encode())
        digest.update(bits[::stride].cpu().numpy().tobytes())
    return digest.hexdigest()


def tokens_digest(tokens: Tensor | None) -> str | None:
    """sha256 of windows of tokens, int64 `[windows, seq]`."""
    return None if tokens is None else hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def require_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with another run than the one that was interrupted.

    Raises:
        UserError: naming the first difference.
    """
    now = json.loads(json.dumps(now))  # tuples become lists, as in the file
    found = _difference(before, now, "")
    if found:
        name, old, new = found
        raise UserError(
            f"the interrupted run had {name} = {old}, this one has {new}; give the same, or --accept-changes to go on "
            "all the same, or --restart to begin anew."
        )


def _difference(before: Any, now: Any, name: str) -> tuple[str, Any, Any] | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            found = _difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return (name, before, now) if before != now else None
