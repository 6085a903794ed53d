"""The bypass: a layer instance's `forward` becomes the identity, so that the layer costs nothing per forward pass."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from trsp_fast.errors import UserError
from trsp_fast.models.families import LayerStack, layer_stack
from trsp_fast.models.gathering import is_divided

ABSENT = object()  # the layer instance had no `forward` of its own


@contextmanager
def bypassed(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[PreTrainedModel]:
    """The model with `layers` as the identity, at no cost per forward pass.

    Raises:
        UserError: at the forward pass, if it uses a KV cache whose length is read from a bypassed layer.
    """
    stack = layer_stack(model)
    with ExitStack() as undo:
        for index in layers:  # one by one: an identity that takes a forward pass may fail
            layer, forward = stack.layers[index], Identity(model, stack, index)
            undo.callback(restore_forward, layer, replace_forward(layer, forward))
        yield model


class Identity:
    """The `forward` of a bypassed layer: it returns its input in the form in which the layer returns its output."""

    def __init__(self, model: PreTrainedModel, stack: LayerStack, index: int) -> None:
        self.index = index
        self.returned = _returned(model, stack.layers[index])
        self.divided = is_divided(stack.layers[index])
        self.reports_length = index in _length_layers(model, len(stack))

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        for cache in caches:  # given as past_key_values by some models, as layer_past by others
            if hasattr(cache, "miss"):
                cache.miss(self.index)
        if self.reports_length and not all(hasattr(cache, "miss") for cache in caches):
            raise UserError(
                f"layer {self.index} is bypassed and the KV cache reads its length there; "
                "call the model with use_cache=False, give a SlabCache, or remove the layer with remove_layers."
            )
        if self.divided:  # FSDP's hooks hand in a view of the states and hang on to what comes out
            hidden_states = hidden_states.clone()
        return (hidden_states, *[None] * (self.returned - 1)) if self.returned else hidden_states


def is_bypassed(layer: nn.Module) -> bool:
    return isinstance(layer.__dict__.get("forward"), Identity)


def replace_forward(layer: nn.Module, forward: Any) -> Any:
    """Give the layer instance this `forward`; what was there in the instance before, or `ABSENT`."""
    before = layer.__dict__.get("forward", ABSENT)
    layer.__dict__["forward"] = forward
    return before


def restore_forward(layer: nn.Module, before: Any) -> None:
    """Undo `replace_forward`."""
    del layer.__dict__["forward"]
    if before is not ABSENT:
        layer.__dict__["forward"] = before


def _length_layers(model: PreTrainedModel, count: int) -> set[int]:
    """The layers at which transformers reads a cache's length: the first, and the first of every layer type."""
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ["full"] * count
    return {types.index(kind) for kind in set(types)}


def _returned(model: PreTrainedModel, layer: nn.Module) -> int:
    """Entries of the tuple that a layer hands on, 0 for a tensor; where its signature does not say, a pass tells."""
    annotation = inspect.signature(type(layer).forward).return_annotation
    if annotation in (Tensor, "torch.Tensor", "Tensor"):
        return 0
    seen: list[int] = []
    handle = layer.register_forward_hook(
        lambda _module, _args, output: seen.append(len(output) if isinstance(output, tuple) else 0)
    )
    try:
        with torch.no_grad():
            tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
            model(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    return seen[0]
