"""Frozen layers that stay in host memory: each call gets its layer's weights on the device, the next ones on their way.

So that stage 1 runs on a device that the model does not fit on: two layers' weights are there at a time.
"""

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.errors import UserError
from trsp_fast.models.bypass import ABSENT, is_bypassed, replace_forward, restore_forward
from trsp_fast.models.checkpoint import resolve_device
from trsp_fast.models.families import layer_stack

HOST = torch.device("cpu")
AT_ONCE = 2  # layers whose weights are on the device: the one at work and the next one


def placed(model: PreTrainedModel, config: TRSPConfig) -> AbstractContextManager[None]:
    """The layers streamed to the run's device inside, where `run.offload` says so."""
    if config.run.offload == "none":
        return nullcontext()
    return streamed_layers(model, resolve_device(config.device))


@contextmanager
def streamed_layers(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Inside, the model works on `device` while the weights of its layers stay on the host; the rest is on the device.

    Losses and the gradients of gates and hidden states are those of the model on the device, bit for bit: a layer that
    takes part in a backward pass keeps its input only and is computed again there, on weights fetched again. Layers
    that are bypassed are not fetched. A bypass, a checkpoint or hooks may come before or inside; weights and dtypes
    must not change. For a GPU the layers' weights are pinned, and stay so.

    Raises:
        UserError: the layers are not in host memory, or it cannot be pinned; at the forward pass, if their weights
            want gradients.
    """
    stack = layer_stack(model)
    _make_ready(stack.layers, device)
    stream, before = WeightStream(stack.layers, device), {}
    with _others_on(model, stack.layers, device):
        for index, layer in enumerate(stack.layers):
            if not is_bypassed(layer):
                before[index] = replace_forward(layer, StreamedForward(stream, index))
        try:
            yield
        finally:
            for index, forward in before.items():
                restore_forward(stack.layers[index], forward)
            stream.drop()


@contextmanager
def resident(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[None]:
    """Those of `layers` that are streamed are on the device as a whole inside, so that memory can be measured."""
    forwards = [layer_stack(model).layers[index].__dict__.get("forward") for index in layers]
    streamed = [forward for forward in forwards if isinstance(forward, StreamedForward)]
    for forward in streamed:
        forward.stream.keep(forward.index)
    try:
        yield
    finally:
        for forward in streamed:
            forward.stream.let_go(forward.index)


def streamed_bytes(model: PreTrainedModel) -> int:
    """What streamed layers take on the device at most, 0 where none is streamed."""
    layers = layer_stack(model).layers
    streamed = [layer for layer in layers if isinstance(layer.__dict__.get("forward"), StreamedForward)]
    return AT_ONCE * max((sum(p.nbytes for p in layer.parameters()) for layer in streamed), default=0)


class _Fetched(NamedTuple):
    """A layer's weights on the device, by name, and what to wait for before they are used."""

    weights: dict[str, Tensor]
    ready: torch.cuda.Event | None


class WeightStream:
    """The way of weights from the host to the device, at most one layer ahead of the one at work.

    On a GPU they are copied on a stream of their own, into memory of the computing stream: it is handed out when all
    that used it before has been given to that stream, so the copy waits for as much and nothing else has to be
    recorded; with one layer ahead this leaves it the whole computation of a layer. The process never waits.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.layers, self.device = layers, device
        self._coming: dict[int, _Fetched] = {}
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._highest: int | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, index: int, following: int | None) -> dict[str, Tensor]:
        """The weights of one layer, while those of `following` set out (its own: they are kept for its next call)."""
        if index in self._kept:
            return self._kept[index]
        fetched = self._coming.pop(index, None) or self._fetch(index)
        self.drop()
        if following is not None and following not in self._kept:
            self._coming[following] = fetched if following == index else self._fetch(following)
        return self._arrived(fetched)

    def above(self, index: int) -> int | None:
        """The next layer that will be called in a forward pass."""
        higher = range(index + 1, len(self.layers))
        return next((other for other in higher if not is_bypassed(self.layers[other])), None)

    def below(self, index: int) -> int | None:
        """The layer whose turn is next in the backward pass; `index` is the highest so far of this forward pass."""
        below = self._highest if self._highest is not None and self._highest < index else None
        self._highest = index
        return below

    def drop(self) -> None:
        """Let go of weights that were fetched in vain."""
        while self._coming:
            self._arrived(self._coming.popitem()[1])  # their memory is not free before the copy has ended

    def keep(self, index: int) -> None:
        """Fetch a layer's weights for all calls until `let_go`."""
        self._kept[index] = self._arrived(self._fetch(index))

    def let_go(self, index: int) -> None:
        """Undo `keep`."""
        del self._kept[index]

    def _fetch(self, index: int) -> _Fetched:
        weights = {name: parameter.detach() for name, parameter in self.layers[index].named_parameters()}
        if self._copies is None:
            return _Fetched({name: weight.to(self.device, copy=True) for name, weight in weights.items()}, None)
        target = {name: torch.empty_like(weight, device=self.device) for name, weight in weights.items()}
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            for name, weight in weights.items():
                target[name].copy_(weight, non_blocking=True)
        return _Fetched(target, self._copies.record_event())

    def _arrived(self, fetched: _Fetched) -> dict[str, Tensor]:
        if fetched.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(fetched.ready)
        return fetched.weights


class StreamedForward:
    """The `forward` of a streamed layer."""

    def __init__(self, stream: WeightStream, index: int) -> None:
        self.stream, self.index = stream, index
        self._call = _Call(stream.layers[index])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        above, layer = self.stream.above(self.index), self._call.layer
        if not (torch.is_grad_enabled() and any(_wants_gradient(value) for value in tree_leaves((args, kwargs)))):
            return self._compute(above, args, kwargs)
        if any(parameter.requires_grad for parameter in layer.parameters()):
            raise UserError(
                f"the weights of layer {self.index} want gradients but stay in host memory; freeze them, or give "
                "run.offload=none."
            )
        # The highest one is needed next by the backward pass, which goes down.
        below, first = self.stream.below(self.index), iter([self.index if above is None else above])

        def compute(*args: Any, **kwargs: Any) -> Any:
            return self._compute(next(first, below), args, kwargs)

        return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=layer.training, **kwargs)

    def _compute(self, following: int | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        weights = self.stream.take(self.index, following)
        return torch.func.functional_call(self._call, {f"layer.{n}": w for n, w in weights.items()}, args, kwargs)


class _Call(nn.Module):
    """A layer without the hooks of its own, which lie around the streamed forward already."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        before = layer.__dict__.get("forward", ABSENT)
        self.function = functools.partial(type(layer).forward, layer) if before is ABSENT else before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _wants_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _make_ready(layers: nn.ModuleList, device: torch.device) -> None:
    """Pinned where the device is a GPU, which can fetch from there on its own; one tensor at a time."""
    for parameter in layers.parameters():
        if parameter.device != HOST:
            raise UserError(
                f"run.offload is weights, but the layers are on {parameter.device} already; load the model on the cpu, "
                "or give run.offload=none."
            )
        if device.type == "cuda" and not parameter.is_pinned():
            try:
                parameter.data = parameter.data.pin_memory()
            except RuntimeError as error:
                raise UserError(
                    f"host memory for the layers cannot be pinned ({str(error).splitlines()[0].rstrip('.')}); free "
                    "some, or give run.offload=none."
                ) from None


@contextmanager
def _others_on(model: PreTrainedModel, layers: nn.ModuleList, device: torch.device) -> Iterator[None]:
    """All but the layers' parameters on the device inside. Their values on the host stay and come back."""
    inside = set(layers.modules())
    others = {p for module in model.modules() if module not in inside for p in module.parameters(recurse=False)}
    own = [(parameter, parameter.data) for parameter in others if not parameter.is_meta]
    homes = {buffer: buffer.device for buffer in model.buffers() if not buffer.is_meta}
    for tensor in (*(parameter for parameter, _ in own), *homes):
        tensor.data = tensor.data.to(device)
    try:
        yield
    finally:
        for parameter, data in own:
            parameter.data = data
        for buffer in model.buffers():  # some are made anew for longer inputs
            if not buffer.is_meta:
                buffer.data = buffer.data.to(homes.get(buffer, HOST))
