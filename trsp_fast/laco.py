"""Layer collapse (LaCo, arXiv 2402.11187): layers are not taken out but merged into one below them.

A merge is theta_l + sum over k = 1..m of (theta_{l+k} - theta_l); the m layers go. From the top down, each merge is
tried on a few windows and stays if the last hidden states are similar enough to the untouched model's. The paper is
given a threshold T and finds how many layers go; here their number is given, so that T is what is found: the highest
one with which the paper's walk takes out that many. It is lowered to the best similarity that failed, since between
two such values the walk is the same, and the last merge takes only as many layers as are still to go.

Layers count from 0. Of the paper's sentences a window is one, its similarity the cosine of all its states as one
vector. The authors' code takes each difference to the layer as merged so far, so that only the topmost layer is left
of a merge; this is the paper's formula.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.objective import INFERENCE_BATCH
from trsp_fast.errors import UserError
from trsp_fast.models.families import layer_stack
from trsp_fast.models.removal import remove_layers
from trsp_fast.run.events import Events

Merge = tuple[int, int]  # a layer, by its number in the model at that time, and how many above it go into it


@dataclass(frozen=True)
class Collapse:
    """What `merge` did.

    groups: for each layer of the result, the layers of the source that it is made of, ascending.
    threshold: T, with which the walk took out as many layers as asked.
    similarity: of the result to the source.
    history: one entry per merge of that walk, tried or kept: layer and merged (numbers in the model at that time),
        similarity, kept.
    window_forwards: the cost; one forward pass of one window counts 1, a smaller model's pass its share of the layers.
    """

    groups: list[list[int]]
    threshold: float
    similarity: float
    history: list[dict[str, Any]]
    window_forwards: int


def merge(
    model: PreTrainedModel,
    count: int,
    tokens: Tensor,
    *,
    at_once: int = 4,
    lowest: int = 1,
    highest: int | None = None,
    interval: int = 2,
    threshold: float = 1.0,
    events: Events | None = None,
) -> tuple[PreTrainedModel, Collapse]:
    """A model with `count` layers fewer, by layer collapse. It is an ordinary one; the source stays as it is.

    As with `remove_layers`, parameters that no merge has touched are the source's own.

    Args:
        tokens: few calibration windows, int64 `[samples, seq]`; the source's last hidden states of all are kept.
        at_once: C, how many layers become one in a merge.
        lowest: L, the lowest layer that others are merged into.
        highest: H, one more than the highest layer that the first merge takes; all layers by default.
        interval: I, how far below a kept merge the next one is tried at least.
        threshold: T, at which the search for it begins.
        events: hears each similarity that was measured.

    Raises:
        UserError: `count` or a range that cannot be, layers of different shapes, or no threshold takes out so many.
    """
    total = len(layer_stack(model))
    highest = total if highest is None else highest
    TRSPConfig(num_layers=count).layer_count(total)
    if at_once < 2 or interval < 1:
        raise UserError(f"at_once is {at_once} and interval {interval}; give at least 2 and at least 1.")
    if not 0 <= lowest <= highest - at_once <= total - at_once:
        raise UserError(
            f"lowest is {lowest} and highest {highest}; {at_once} of {total} layers at once need "
            f"0 <= lowest <= highest - {at_once} and highest <= {total}."
        )
    _check_alike(layer_stack(model).layers, lowest)
    training = model.training
    model.eval()  # the models that are tried take it over
    try:
        walker = _Walker(model, count, tokens, (at_once, lowest, highest, interval), events or Events())
        while not walker.walk(threshold):
            failed = [entry["similarity"] for entry in walker.history if entry["similarity"] <= threshold]
            if not failed:
                raise UserError(
                    f"{count} layers are to go but merging {at_once} at once from layer {highest - 1} down to {lowest} "
                    f"takes out {total - len(walker.groups)} with the lowest threshold, {count} with none; ask for "
                    "fewer, or change at_once, interval or lowest."
                )
            threshold = math.nextafter(max(failed), -math.inf)
    finally:
        model.train(training)
    kept = [entry for entry in walker.history if entry["kept"]]
    collapse = Collapse(walker.groups, threshold, kept[-1]["similarity"], walker.history, math.ceil(walker.cost))
    return walker.small.train(training), collapse


def _merged(model: PreTrainedModel, layer: int, merged: int) -> PreTrainedModel:
    """A new model in which the `merged` layers above `layer` are merged into it, with sums in fp32.

    Buffers, which nothing learns, are those of `layer`. The parameters of all other layers are shared.
    """
    sources = layer_stack(model).layers[layer : layer + merged + 1]
    small = remove_layers(model, range(layer + 1, layer + merged + 1))
    target = layer_stack(small).layers[layer]
    others = [dict(source.named_parameters()) for source in sources[1:]]
    for name, base in sources[0].named_parameters():
        with torch.no_grad():
            start = base.to(torch.promote_types(base.dtype, torch.float32))
            value = start + sum(other[name].to(start) - start for other in others)
        owner, _, leaf = name.rpartition(".")
        new = nn.Parameter(value.to(base.dtype), requires_grad=base.requires_grad)
        setattr(target.get_submodule(owner), leaf, new)
    return small


@dataclass
class _Walker:
    """Walks down the layers with one threshold after the other; what a walk shares with those before is not rerun.

    sizes: C, L, H and I of the paper.
    """

    model: PreTrainedModel
    count: int
    tokens: Tensor
    sizes: tuple[int, int, int, int]
    events: Events
    cost: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    _similarities: dict[tuple[Merge, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._states = list(self._last_states(self.model))

    def walk(self, threshold: float) -> bool:
        """The paper's algorithm 1 on the untouched model, ended when `count` layers are gone; whether they are."""
        at_once, lowest, highest, interval = self.sizes
        self.small, self.history = self.model, []
        self.groups = [[layer] for layer in range(len(layer_stack(self.model)))]
        end = len(self.groups) - self.count
        kept: tuple[Merge, ...] = ()
        layer = highest - at_once
        while layer >= lowest and len(self.groups) > end:
            merged = min(at_once - 1, len(self.groups) - layer - 1, len(self.groups) - end)
            tried = (*kept, (layer, merged))
            similarity = self._similarity(tried)
            accepted = similarity > threshold
            self.history.append({"layer": layer, "merged": merged, "similarity": similarity, "kept": accepted})
            if accepted:
                kept = tried
                self.small = _merged(self.small, layer, merged)
                together = slice(layer, layer + merged + 1)
                self.groups[together] = [[one for group in self.groups[together] for one in group]]
                layer = min(layer - interval, len(self.groups) - at_once)
            else:
                layer -= 1
        return len(self.groups) == end

    def _similarity(self, merges: tuple[Merge, ...]) -> float:
        """Of the untouched model and the current one after the last of these merges."""
        if merges not in self._similarities:
            layer, merged = merges[-1]
            trial = _merged(self.small, layer, merged)
            cosines = [
                F.cosine_similarity(own.flatten(1).double(), theirs.flatten(1).double(), dim=-1)
                for own, theirs in zip(self._last_states(trial), self._states, strict=True)
            ]
            self._similarities[merges] = similarity = float(torch.cat(cosines).mean())
            self.events.emit("candidate", layer=layer, merged=merged, similarity=similarity)
        return self._similarities[merges]

    @torch.no_grad()
    def _last_states(self, model: PreTrainedModel) -> Sequence[Tensor]:
        """The last hidden states of all windows, after the final norm, by batch, in host memory."""
        device = next(model.parameters()).device
        self.cost += len(self.tokens) * len(layer_stack(model)) / len(layer_stack(self.model))
        return [
            model.base_model(input_ids=batch.to(device), use_cache=False).last_hidden_state.cpu()
            for batch in self.tokens.split(INFERENCE_BATCH)
        ]


def _check_alike(layers: nn.ModuleList, lowest: int) -> None:
    """Layers are merged parameter by parameter; any from `lowest` on may be merged with any.

    Raises:
        UserError: two of them differ in a parameter's name or shape.
    """
    shapes = [{name: list(parameter.shape) for name, parameter in layer.named_parameters()} for layer in layers]
    for index in range(lowest + 1, len(layers)):
        one, other = shapes[lowest], shapes[index]
        odd = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
        if odd:
            raise UserError(
                f"layers {lowest} and {index} cannot be merged: {odd[0]} is {one.get(odd[0], 'not there')} in one and "
                f"{other.get(odd[0], 'not there')} in the other; raise lowest above the layers that are unlike the "
                "rest, or choose another method."
            )
