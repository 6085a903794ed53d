"""What makes two runs the same run: model, tokens, configuration, versions. A run is resumed as what it was."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from trsp_fast.errors import UserError

SAMPLED = 4096  # elements of each weight that are hashed as they are; all of them count in a sum

_ORIGINS = ("_name_or_path", "name_or_path", "transformers_version")

# what is known by a digest, which says nothing to a reader
_DIGESTS = {"tokens": "calibration tokens", "evaluation": "evaluation tokens", "other": "text of another domain"}

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> str:
    """Tells models apart by their configuration and every parameter's name, dtype, shape and bits.

    Each weight is read once, on its device.
    """
    digest = hashlib.sha256(_settings(model).encode())
    for name, parameter in model.named_parameters():
        bits = parameter.detach().reshape(-1).view(_INTEGERS[parameter.element_size()])
        stride = max(1, len(bits) // SAMPLED)
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)} {int(bits.sum(dtype=torch.int64))}".encode())
        digest.update(bits[::stride].cpu().numpy().tobytes())
    return digest.hexdigest()


def _settings(model: nn.Module) -> str:
    """A model's configuration without what says where it came from: the same weights compute otherwise with another."""
    config = getattr(model, "config", None)
    if config is None:
        return ""
    plain = json.loads(
        json.dumps(config.to_dict(), default=str),
        object_hook=lambda values: {name: value for name, value in values.items() if name not in _ORIGINS},
    )
    return json.dumps(plain, sort_keys=True)


def tokens_digest(tokens: Tensor | None) -> str | None:
    """sha256 of windows of tokens, int64 `[windows, seq]`."""
    if tokens is None:
        return None
    return hashlib.sha256(str(list(tokens.shape)).encode() + tokens.cpu().contiguous().numpy().tobytes()).hexdigest()


def require_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on with another run than the one that was interrupted.

    Raises:
        UserError: naming the first difference.
    """
    if found := first_difference(before, now):
        raise UserError(
            f"the interrupted run had {found}; give the same, or --accept-changes to go on all the same, or --restart "
            "to begin anew."
        )


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What the interrupted one had, in words that follow "had"; `before` is as its file has it, None: no difference."""
    found = _difference(before, json.loads(json.dumps(now)), "")  # tuples become lists, as in the file
    if found is None:
        return None
    name, old, new = found
    if name == "model":
        return "another model"
    if name not in _DIGESTS:
        return f"{name} = {old}, this one has {new}"
    if old is None:
        return f"no {_DIGESTS[name]}, this one has some"
    return f"{_DIGESTS[name]}, this one has none" if new is None else f"other {_DIGESTS[name]}"


def _difference(before: Any, now: Any, name: str) -> tuple[str, Any, Any] | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            found = _difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return (name, before, now) if before != now else None
