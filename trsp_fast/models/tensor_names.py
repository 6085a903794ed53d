"""What the names of a checkpoint's tensors say: the layer each belongs to, and its name after a cut. Needs no torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trsp_fast.errors import UserError
from trsp_fast.models.families import layer_count, mtp_layers, text_fields

_NUMBER = r"(0|[1-9][0-9]{0,5})"
_MTP = re.compile(r"(?:^|\.)mtp[._]")


@dataclass(frozen=True)
class CutNames:
    """path: the prefix of the decoder layers' tensors. new: old name -> new name of every tensor that stays.

    predicting: the tensors that predict further tokens ahead (multi-token prediction), which no cut keeps.
    """

    path: str
    new: dict[str, str]
    predicting: list[str]


def cut_names(names: Iterable[str], config: dict[str, Any], kept: list[int]) -> CutNames:
    """Names before and after a cut that keeps the layers `kept`; `config` is the dict of the config.json.

    Multi-token prediction goes: its layers read the hidden states of the whole model, and transformers loads them for
    speculative decoding only. They are numbered on after the last layer (DeepSeek-V3, GLM-4 MoE) or named mtp.

    Raises:
        UserError: the layers cannot be told by the names.
    """
    names = list(names)
    _, count = layer_count(text_fields(config))
    predicting = [name for name in names if _MTP.search(name)]
    path = _layer_path([name for name in names if not _MTP.search(name)], count, config)
    position = {old: new for new, old in enumerate(kept)}
    layer = re.compile(re.escape(path) + rf"\.{_NUMBER}\.(.*)", re.DOTALL)
    new = {}
    for name in names:
        found = layer.fullmatch(name)
        if found is not None and int(found[1]) >= count:
            predicting.append(name)
        elif found is not None and int(found[1]) in position:
            new[name] = f"{path}.{position[int(found[1])]}.{found[2]}"
        elif found is None and not _MTP.search(name):
            new[name] = name
    if len(set(new.values())) != len(new):
        raise UserError(f"two tensors under {path} would have the same name; give an intact checkpoint.")
    return CutNames(path, new, predicting)


def dropped_predictors(count: int) -> str:
    """What the user is told of the tensors of multi-token prediction."""
    return f"{count} tensors of multi-token prediction are dropped, since they read what the whole model computes."


def _layer_path(names: list[str], count: int, config: dict[str, Any]) -> str:
    """The prefix under which the tensors of the decoder layers stand: `model.layers` of `model.layers.0.mlp...`."""
    indices: dict[str, set[int]] = {}
    for name in names:
        for found in re.finditer(rf"\.{_NUMBER}(?=\.)", name):
            indices.setdefault(name[: found.start()], set()).add(int(found[1]))
    stacks = [prefix for prefix, seen in indices.items() if set(range(count)) <= seen]
    # Experts and the like are lists inside a layer.
    stacks = [prefix for prefix in stacks if not any(prefix.startswith(f"{other}.") for other in stacks)]
    if "text_config" in config and len(stacks) > 1:  # the other towers of a vision-language model
        stacks = [prefix for prefix in stacks if re.search(r"language|text", prefix)]
    if len(stacks) != 1:
        raise UserError(
            f"the checkpoint has {len(stacks)} groups of tensors for {count} layers, not one; give a decoder model."
        )
    if beyond := sorted(indices[stacks[0]] - set(range(count + mtp_layers(config)))):
        raise UserError(
            f"the checkpoint has tensors of layer {stacks[0]}.{beyond[0]}, but the configuration names {count} layers "
            f"and {mtp_layers(config)} of multi-token prediction; give a checkpoint whose config.json is its own."
        )
    return stacks[0]
