"""Decoder layers through torch.compile: their elementwise work fused, the model around them as it is."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from trsp_fast.models.families import layer_stack

RECOMPILES = 16  # per layer, for other shapes and modes; beyond its own limit torch would silently stop compiling


@contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Inside, every layer's forward is compiled. Results change by rounding only.

    One compiled function serves all layers of a class: what differs between two layers are tensors. Hooks, gates,
    bypasses and recomputation stay outside of it. The first passes take long, for every new shape again.
    """
    layers = layer_stack(model).layers
    functions = {kind: torch.compile(kind.forward, dynamic=False) for kind in {type(layer) for layer in layers}}
    plain = [layer for layer in layers if "forward" not in layer.__dict__]  # a bypassed one computes nothing anyway
    for layer in plain:
        layer.__dict__["forward"] = functools.partial(functions[type(layer)], layer)
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILES * len(layers)):
            yield
    finally:
        for layer in plain:
            del layer.__dict__["forward"]
