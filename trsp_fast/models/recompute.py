"""Layers that forget what they computed and compute it again in the backward pass (non-reentrant checkpointing)."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trsp_fast.models.families import layer_stack


@contextmanager
def recomputed(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[None]:
    """Inside, `layers` keep their input only. Losses and gradients are the same to the bit.

    transformers' own switch works in training mode only and for all layers alike. Hooks stay outside of what is
    recomputed, so gates and norms see every layer once. A bypass inside this context lies over it.
    """
    stack = layer_stack(model)
    before = {index: stack.layers[index].__dict__.get("forward") for index in layers}
    for index in before:
        layer = stack.layers[index]
        layer.__dict__["forward"] = functools.partial(_recompute, layer.forward)
    try:
        yield
    finally:
        for index, forward in before.items():
            del stack.layers[index].__dict__["forward"]
            if forward is not None:
                stack.layers[index].__dict__["forward"] = forward


def _recompute(forward: Any, *args: Any, **kwargs: Any) -> Any:
    # Nothing in a layer draws random numbers here: stages run in evaluation mode, without dropout.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
