"""Where a model came from: the name of its base model and its licence, as its own card or configuration says."""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

_CARD = "README.md"
_FIELDS = ("license", "license_name", "license_link")
_LONGEST = 1 << 16  # bytes of a card that are read: the front matter stands first
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def origin(config: PreTrainedConfig) -> dict[str, Any]:
    """`base_model` (a hub name or a folder's name, None of neither) and `license`: its fields, empty if unknown."""
    name = config.name_or_path or ""
    path = _card_of(name, getattr(config, "_commit_hash", None))
    found = _licence(front_matter(path.read_bytes()[:_LONGEST])) if path else {}
    stated = _licence({"license": getattr(config, "license", None)})
    return {"base_model": _base_model(name), "license": found or stated}


def front_matter(card: bytes) -> dict[str, Any]:
    """The fields at the head of a model card; none where there is no such head or it is not YAML."""
    match = _FRONT_MATTER.match(card.decode("utf-8", errors="replace"))
    try:
        values = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _licence(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a licence that are text, or lists of it, of a length that a licence's name has."""
    kept = {name: values[name] for name in _FIELDS if _is_name(values.get(name)) or _is_names(values.get(name))}
    return kept if "license" in kept else {}


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 300


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 20 and all(map(_is_name, value))


def _card_of(name: str, commit: str | None) -> Path | None:
    """The card beside the model: in its folder, or on the hub where the model was fetched from there."""
    if os.path.isdir(name):
        path = Path(name) / _CARD
        return path if path.is_file() else None
    import huggingface_hub

    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json", revision=commit), str):
            return None
        return Path(huggingface_hub.hf_hub_download(name, _CARD, revision=commit))
    except Exception:  # the hub raises dozens of kinds; a model without a card is common
        return None


def _base_model(name: str) -> str | None:
    if not os.path.isdir(name):
        return name or None
    folder = os.path.realpath(name)
    cached = re.search(r"/models--([^/]+?)--([^/]+)/snapshots/", folder + "/")  # as the hub's cache names its folders
    return f"{cached[1]}/{cached[2]}" if cached else os.path.basename(folder)
