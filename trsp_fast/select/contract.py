"""What every method of choosing layers takes and gives."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.models.families import fixed_layers, layer_stack


@dataclass(frozen=True)
class Selection:
    """Layers in the order of choice, with the evidence.

    history: one entry per step or candidate. rounds: one entry per chosen layer, where a method has rounds, and then
        one per earlier choice that was looked at again (`instead_of`).
    window_forwards: the cost; one forward pass of one window counts 1, a backward pass 2.
    """

    layers: list[int]
    history: list[dict[str, Any]] = field(default_factory=list)
    window_forwards: int = 0
    rounds: list[dict[str, Any]] = field(default_factory=list)


def candidates(model: PreTrainedModel, config: TRSPConfig, *, protect: bool = True) -> list[int]:
    """The layers that may go, ascending: all but the protected first and last ones and those others depend on."""
    total = len(layer_stack(model))
    if not protect:
        return list(range(total))
    fixed = fixed_layers(model.config.to_dict())
    open_to_choice = range(config.select.protect_first, max(0, total - config.select.protect_last))
    return [layer for layer in open_to_choice if layer not in fixed]
