"""How a batch is computed in the memory there is: micro-batches, and which layers are computed twice.

Nothing is guessed: a step with no, one, two and three layers switched on (the others bypassed) is run on one and on two
windows and its peak measured. A step's peak is linear in the windows, and every further layer of a kind adds what the
last one added, so these few passes give the peak of the whole step:

    peak = fixed + max(head + all layers, over layers: one at work + those below it + the gradients of those above it)
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from trsp_fast.errors import UserError
from trsp_fast.models.families import fixed_layers, layer_stack
from trsp_fast.models.free_memory import free_memory
from trsp_fast.models.gates import bypassed
from trsp_fast.models.offload import resident, streamed_bytes
from trsp_fast.models.recompute import recomputed

# Tokens in one pass on a CPU: 16 windows of 256 took 3.05 s at once, 2.36 s by fours, 2.57 s by twos (NOTES.md)
CPU_TOKENS = 1024
SHARE = 0.9  # of the free memory that a plan may use


@dataclass(frozen=True)
class MemoryPlan:
    """In which pieces a stage computes a batch.

    micro_batch: windows in one forward pass.
    recomputed: layers that keep their input only.
    parts: bytes by what needs them, above the weights as they were loaded; their sum is the predicted peak.
    available: bytes that were free when the plan was made.
    """

    micro_batch: int
    recomputed: tuple[int, ...] = ()
    parts: dict[str, int] = field(default_factory=dict)
    available: int = 0

    @property
    def peak(self) -> int:
        """Predicted peak in bytes."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MemoryPlan":
        return cls(values["micro_batch"], tuple(values["recomputed"]), values["parts"], values["available"])


def plan_memory(
    model: PreTrainedModel,
    step: Callable[[int], None],
    batch: int,
    length: int,
    *,
    gated: Sequence[int],
    held: dict[str, int],
    coming: dict[str, int],
    gradients: int = 0,
    available: int | None = None,
) -> MemoryPlan:
    """The largest micro-batch that fits, and as few recomputed layers as it takes for a single window.

    Args:
        step: forward and backward pass of so many windows; gradients are cleared afterwards.
        batch: windows in an optimiser step.
        length: tokens of a window.
        gated: the layers that carry a gate or whose difference is penalised, and need more than others of their kind.
        held: bytes that the stage holds already, by name (fp32 copies, teacher, ...).
        coming: bytes that it will allocate and hold (optimiser, ...).
        gradients: bytes of all weight gradients.
        available: bytes that may be used; by default what is free on the model's device.

    Raises:
        UserError: a single window does not fit even so.
    """
    device = next(model.parameters()).device
    available = free_memory(device) if available is None else available
    try:
        costs = _measured_in_what_fits(model, step, device, min(2, batch), gated)
    except KeyError:
        if not fixed_layers(model.config.to_dict()):
            raise
        return MemoryPlan(1, ())  # a layer looks for another's keys and values (Gemma 3n, 4): none can be left out
    # On a GPU a larger pass is never slower
    sizes = [batch if device.type == "cuda" else min(batch, max(1, CPU_TOKENS // length))]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    choices = [(size, 0) for size in sizes] + [(1, count) for count in range(1, len(costs.kinds) + 1)]
    for size, count in choices:
        parts = {**coming, **costs.parts(size, size < batch, gradients, set(range(count)))}
        if sum(parts.values()) <= SHARE * available:
            return MemoryPlan(size, tuple(range(count)), {**held, **parts}, available)
    raise UserError(
        f"one window needs {sum(parts.values()) / 1e9:.2f} GB beside the weights, {available / 1e9:.2f} GB are free; "
        "set data.seq_len lower, or use a device with more memory."
    )


def unprobed(model: PreTrainedModel) -> MemoryPlan:
    """What takes least: one window in a pass, every layer recomputed. Divided weights come and go, and are not probed.

    A process that ran out of memory while probing would leave the others waiting.
    """
    return MemoryPlan(1, tuple(range(len(layer_stack(model)))))


@dataclass(frozen=True)
class _Line:
    """Bytes as a line in the number of windows."""

    fixed: float
    per_window: float

    def at(self, windows: int) -> float:
        return self.fixed + self.per_window * windows

    def __sub__(self, other: "_Line") -> "_Line":
        return _Line(self.fixed - other.fixed, self.per_window - other.per_window)


@dataclass(frozen=True)
class _Costs:
    """Peaks of a step without layers (`head`); by kind of layer with one at work, and what a further one adds."""

    kinds: list[str]
    head: _Line
    one: dict[tuple[str, bool], _Line]
    more: dict[tuple[str, bool], _Line]

    def parts(self, windows: int, accumulates: bool, gradients: int, twice: set[int]) -> dict[str, int]:
        layers = [(kind, index in twice) for index, kind in enumerate(self.kinds)]
        more = [max(0.0, self.more[layer].at(windows)) for layer in layers]
        kept, below, peak = sum(more), 0.0, 0.0
        # The backward pass goes down: at a layer those above are let go of, and have left their gradients.
        for index, layer in enumerate(layers):
            left = 0.0 if accumulates else gradients * (1 - index / len(layers))
            peak = max(peak, below + self.one[layer].at(windows) + left)
            below += more[index]
        peak = max(peak, kept + self.head.at(windows))
        own = {"kept for the backward pass": round(kept), "head and working memory": round(peak - kept)}
        return {**own, "gradients": gradients} if accumulates else own


def _measured_in_what_fits(
    model: PreTrainedModel, step: Callable[[int], None], device: torch.device, most: int, gated: Sequence[int]
) -> _Costs:
    """One window says too much rather than too little, where two windows of two layers do not fit."""
    for windows in (most, 1):
        try:
            return _measure(model, step, device, windows, gated)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
    raise UserError(
        "there is not enough memory for one window in two layers; set data.seq_len lower, or use a device with more."
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _measure(
    model: PreTrainedModel, step: Callable[[int], None], device: torch.device, most: int, gated: Sequence[int]
) -> _Costs:
    layers = layer_stack(model).layers
    streamed = streamed_bytes(model) > 0
    kinds = [_kind(layer) + ("gated" if index in gated else "") for index, layer in enumerate(layers)]

    def step_peaks(on: Sequence[int], twice: Sequence[int]) -> _Line:
        return _line(model, step, device, most, on, twice)

    head = step_peaks((), ())
    one, more = {}, {}
    for kind in dict.fromkeys(kinds):
        same = [index for index, other in enumerate(kinds) if other == kind]
        for again in (False, True):
            # Of frozen layers the lowest has no backward pass: where layers keep their input only, a second one tells
            # what one at work takes, and a third one what a further one adds.
            most_on = 3 if again or streamed else 2
            counts = range(1, min(most_on, len(same)) + 1)
            peaks = [step_peaks(same[:on], same[:on] if again else ()) for on in counts]
            more[kind, again] = peaks[-1] - (peaks[-2] if len(peaks) > 1 else head)
            one[kind, again] = peaks[1] - more[kind, again] if len(peaks) > 2 else peaks[0]
    return _Costs(kinds, head, one, more)


def _line(
    model: PreTrainedModel,
    step: Callable[[int], None],
    device: torch.device,
    most: int,
    on: Sequence[int],
    twice: Sequence[int],
) -> _Line:
    """The peak of a step with only the layers `on`, of which `twice` are recomputed, from 1 and `most` windows.

    Gradients are there before, so that they do not count: when they come depends on what else is there. So are weights
    that are streamed, of which the whole step has no more at a time than a few layers.
    """
    peaks = []
    layers = layer_stack(model).layers
    off = [index for index in range(len(layers)) if index not in on]
    idle = {parameter for index in off for parameter in layers[index].parameters()}
    trained = [p for p in model.parameters() if p.requires_grad and p not in idle]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    with resident(model, on), recomputed(model, twice), bypassed(model, off):
        for windows in (1, most):
            peaks.append(peak_bytes(functools.partial(step, windows), device))
    for parameter in trained:
        parameter.grad = None
    slope = (peaks[1] - peaks[0]) / (most - 1) if most > 1 else 0.0
    return _Line(peaks[0] - slope, slope) if most > 1 else _Line(0.0, peaks[0])


def _kind(layer: torch.nn.Module) -> str:
    """Layers whose tensors have the same names and shapes need the same memory."""
    shapes = [f"{name}{list(parameter.shape)}" for name, parameter in layer.named_parameters()]
    return f"{type(layer).__name__} {' '.join(shapes)} {getattr(layer, 'attention_type', '')}"


def peak_bytes(work: Callable[[], None], device: torch.device) -> int:
    """Peak of what `work` holds in tensors at one time beyond what was there before, in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Live() as live:
        work()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside and not yet gone."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if id(storage) not in known and storage not in self._seen:
                self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self._seen.add(storage)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.bytes -= size


def _storages(values: Any) -> Iterator[Any]:
    for value in tree_iter(values):
        if isinstance(value, torch.Tensor) and not value.is_meta:
            yield value.untyped_storage()
