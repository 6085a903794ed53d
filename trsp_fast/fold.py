"""The closed-form start of stage 2: what the cut layers did, folded into projections of the layers that stay.

A decoder layer ends with a projection whose output is added to the residual stream (`down_proj`, `fc2`, `c_proj`). A
change W of its weight changes the stream by h W, where h is the projection's input. So the W that brings the stream
nearest to the untouched model's, where the next layer reads it, is a ridge regression. It is solved for one layer after
the other, from just before the first gap to the last layer, each on the states that the folded layers below hand on:
two forward passes of the shorter model, and one of the teacher where its states are not stored (more where there is no
room for those of one layer).

ReplaceMe (arXiv 2505.02819) fits one linear map behind the projection before one removed block. Here the projection's
own weight is fitted, and that of every later layer too, against what is still lacking there.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trsp_fast.engine.distributed import Group
from trsp_fast.engine.objective import INFERENCE_BATCH
from trsp_fast.engine.teacher import StoredStates, Teacher, UntouchedModel
from trsp_fast.models.families import layer_stack
from trsp_fast.models.free_memory import free_memory
from trsp_fast.models.prefix import Prefix
from trsp_fast.ridge import VALIDATION, Sums, best_change, with_ones

Projection: TypeAlias = nn.Linear | Conv1D  # weights [hidden, n] and [n, hidden]
PART_TOKENS = 8192  # in one pass: the projection's inputs are held, on a CPU in fp32
TOLERANCE = 0.05  # of a layer's output: bf16 states round what is added to them
STATES_SHARE = 0.25  # of the free memory that the states of all windows may take


class Folded(NamedTuple):
    """One layer's: the squared distance of the states behind it to the untouched model's, relative to their size."""

    projection: Projection
    before: float
    after: float


@dataclass(frozen=True)
class Change:
    """Of a projection's weight, and of its bias where there is one that may change."""

    parameters: tuple[Tensor, ...]
    amounts: tuple[Tensor, ...]

    @classmethod
    def of(cls, module: Projection, bias: Tensor | None, solution: Tensor) -> "Change":
        """Args: solution: `[n, hidden]`, with the bias's row behind the others."""
        weight = solution if bias is None else solution[:-1]
        amounts = (weight.T if isinstance(module, nn.Linear) else weight,)
        return cls((module.weight,), amounts) if bias is None else cls((module.weight, bias), (*amounts, solution[-1]))

    @torch.no_grad()
    def saved(self) -> list[Tensor]:
        """What the parameters are, for `undo`."""
        return [parameter.clone() for parameter in self.parameters]

    @torch.no_grad()
    def apply(self) -> None:
        for parameter, amount in zip(self.parameters, self.amounts, strict=True):
            parameter.add_(amount)

    @torch.no_grad()
    def undo(self, old: Iterable[Tensor]) -> None:
        for parameter, value in zip(self.parameters, old, strict=True):
            parameter.copy_(value)


def fold(
    model: PreTrainedModel,
    teacher: Teacher,
    tokens: Tensor,
    layers: Sequence[int],
    weights: Iterable[nn.Parameter],
    *,
    autocast: AbstractContextManager[Any] | None = None,
    group: Group | None = None,
) -> dict[int, Folded]:
    """Change the projections in place; `layers` must be bypassed, weights that may change in fp32.

    A layer stays as it is where it has no such projection (a norm or an MLP follows the last linear map; experts are
    held in one tensor), where that may not change or is another layer's too, and where the states came no nearer.

    Args:
        teacher: the untouched model, with its states at `fold_points`.
        tokens: calibration windows, int64 `[samples, seq]`.
        layers: those that are cut.
        weights: the parameters that may change.
        autocast: of the forward passes.
        group: processes that share the windows, each with the whole model.

    Returns:
        What was done, by folded layer.
    """
    folding = _Folding(model, teacher, tokens, {id(p) for p in weights}, autocast or nullcontext(), group or Group())
    found = {layer: folding.fold_one(layer, point) for layer, point in _folds(len(layer_stack(model)), layers)}
    return {layer: folded for layer, folded in found.items() if folded is not None}


def fold_points(model: PreTrainedModel, layers: Sequence[int]) -> list[int]:
    """Where states are fitted: see `trsp_fast.engine.teacher.Targets.inputs`."""
    return [point for _, point in _folds(len(layer_stack(model)), layers)]


def projections(model: PreTrainedModel, window: Tensor) -> dict[int, Projection]:
    """By layer the last linear map in it that writes hidden states, as a forward pass of `window` meets them."""
    size, handles = model.config.get_text_config(decoder=True).hidden_size, []
    last: dict[int, Projection] = {}

    def note(index: int) -> Any:
        def hook(module: Projection, args: tuple[Any, ...], output: Tensor) -> None:
            if isinstance(output, Tensor) and output.numel() == window.numel() * size == output[..., 0].numel() * size:
                last[index] = module

        return hook

    def forget(index: int) -> Any:
        """Where a token has several streams, nobody knows which of them is written."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if (output[0] if isinstance(output, tuple) else output).shape != (*window.shape, size):
                last.pop(index, None)

        return hook

    for index, layer in enumerate(layer_stack(model).layers):
        for module in layer.modules():
            if isinstance(module, (nn.Linear, Conv1D)) and module.weight.is_floating_point():
                handles.append(module.register_forward_hook(note(index)))
        handles.append(layer.register_forward_hook(forget(index)))
    try:
        with torch.no_grad():
            model(input_ids=window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return last


def input_size(module: Projection) -> int:
    return module.weight.shape[1 if isinstance(module, nn.Linear) else 0]


@torch.no_grad()
def share_of(
    prefix: Prefix,
    layer: int,
    module: Projection,
    window: Tensor,
    autocast: AbstractContextManager[Any],
    group: Group,
) -> float:
    """The factor with which `layer` hands on what its projection gives (Granite's is not 1), found by trying.

    0 where something else comes of it.
    """
    with autocast:
        plain = prefix.entering(window, layer + 1).float()
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(plain.shape, generator=generator).to(plain.device) * plain.pow(2).mean().sqrt()
    hook = lambda _module, _args, output: output + shift.view(output.shape).to(output.dtype)  # noqa: E731
    with autocast:
        handle = module.register_forward_hook(hook)
        try:
            moved = prefix.entering(window, layer + 1).float() - plain
        finally:
            handle.remove()
    share = float((moved * shift).sum() / shift.pow(2).sum())
    is_sum = float((moved - share * shift).norm()) < TOLERANCE * float(moved.norm())
    if is_sum and abs(share - round(share)) < TOLERANCE:  # not where nothing moves or overflows: nan is no sum
        share = round(share)
    return group.agree(float(share) if is_sum else 0.0)


def place_of_sums(inputs: int, device: torch.device, group: Group) -> torch.device:
    """Where there is room for the sums of one projection and to solve for its change; the same in all processes."""
    place = _place(6 * 8 * inputs * inputs, device) or torch.device("cpu")
    return torch.device("cpu") if group.highest(int(place.type == "cpu"))[0] else place


def _folds(total: int, layers: Sequence[int]) -> list[tuple[int, int]]:
    """(layer that stays, where the states behind it are read), from just before the first gap on."""
    if not layers:
        return []
    kept = [layer for layer in range(total) if layer not in layers]
    pairs = zip(kept, [*kept[1:], total], strict=True)
    return [(layer, point) for layer, point in pairs if point > min(layers)]


class _Walk:
    """A model's states of this process's windows at the layer it has come to, a part of the windows at a time.

    parts: indices of windows. place: where states are kept; None: nowhere, and every pass begins at layer 0. highest:
        the last layer that a pass can begin at.
    """

    def __init__(
        self, model: PreTrainedModel, tokens: Tensor, parts: list[Tensor], place: torch.device | None, highest: int
    ) -> None:
        self.prefix, self.tokens, self.parts, self.place, self.highest = Prefix(model), tokens, parts, place, highest
        self.device, self.end = next(model.parameters()).device, len(layer_stack(model))
        self.start, self.states = 0, list[Tensor]()

    def entering(self, part: int, layer: int) -> Tensor:
        """What enters `layer`, in the precision of the pass."""
        states = self.states[part].to(self.device) if self.start else None
        if layer == self.start and states is not None:
            return states
        return self.prefix.entering(self.tokens[self.parts[part]].to(self.device), layer, self.start, states)

    def keep(self, states: Tensor, layer: int, kept: list[Tensor]) -> None:
        """Add a part's states that enter `layer` to those to go on with, where they can be kept."""
        if self.place is not None and (layer <= self.highest or layer == self.end):
            kept.append(states.to(self.place))

    def go(self, layer: int, kept: list[Tensor]) -> None:
        """On to `layer`; it stays where it is if nothing was kept."""
        if kept:
            self.start, self.states = layer, kept


class _Folding:
    """What goes from layer to layer: the states of the model and, where they are not stored, of the untouched one."""

    def __init__(
        self,
        model: PreTrainedModel,
        teacher: Teacher,
        tokens: Tensor,
        weights: set[int],
        autocast: AbstractContextManager[Any],
        group: Group,
    ) -> None:
        self.teacher, self.tokens, self.autocast, self.group = teacher, tokens, autocast, group
        self.device = next(model.parameters()).device
        batch = max(1, min(INFERENCE_BATCH, PART_TOKENS // tokens.shape[1]))
        self.parts = [rows for rows, _ in group.parts(torch.arange(len(tokens)), batch)]
        window = tokens[:1].to(self.device)
        with autocast:
            self.projections, highest = projections(model, window), Prefix(model).highest(window)
        owners = Counter(id(p) for module in self.projections.values() for p in module.parameters())
        self.weights = {weight for weight in weights if owners[weight] < 2}
        self.hidden = model.config.get_text_config(decoder=True).hidden_size
        states = 4 * self.hidden * tokens.shape[1] * sum(map(len, self.parts))  # bytes of those of all windows
        self.walk = _Walk(model, tokens, self.parts, _place(2 * states, self.device), highest)  # old ones and new
        self.untouched = None
        if isinstance(teacher, UntouchedModel):  # while one model's old and new ones are there, of the other's one
            self.untouched = _Walk(teacher.model, tokens, self.parts, _place(3 * states, self.device), highest)

    @torch.no_grad()
    def fold_one(self, layer: int, point: int) -> Folded | None:
        """None where the layer stays as it is."""
        module, entering = self.projections.get(layer), (self.walk.start, self.walk.states)
        share = 0.0
        if module is not None and id(module.weight) in self.weights:
            window = self.tokens[:1].to(self.device)
            share = share_of(self.walk.prefix, layer, module, window, self.autocast, self.group)
        if module is None or not share:
            self._advance(layer, None)
            return None
        bias = module.bias if module.bias is not None and id(module.bias) in self.weights else None
        fitting, judging, size = self._sums(layer, point, module, share, bias is not None)
        solution, lacking = best_change(fitting, judging, self.device, self.group), float(fitting.c + judging.c)
        if solution is None:
            self._advance(layer, None)
            return None
        change = Change.of(module, bias, solution)
        old = change.saved()
        change.apply()
        left = self._advance(layer, point)
        if left < lacking:
            return Folded(module, lacking / size, left / size)
        change.undo(old)
        self.walk.start, self.walk.states = entering
        self._advance(layer, None)
        return None

    def _outputs(self, layer: int) -> Iterator[tuple[int, Tensor]]:
        """Part by part what `layer` hands on."""
        for part in range(len(self.parts)):
            with self.autocast:  # which must be over where the sums are made
                output = self.walk.entering(part, layer + 1)
            yield part, output

    def _target(self, part: int, point: int) -> Tensor:
        """The untouched model's states that enter layer `point`."""
        with self.autocast:
            if self.untouched is not None:
                return self.untouched.entering(part, point)
            assert isinstance(self.teacher, StoredStates)
            rows = self.parts[part]
            return self.teacher.state(rows, self.tokens[rows].to(self.device), point)

    def _sums(
        self, layer: int, point: int, module: Projection, share: float, with_bias: bool
    ) -> tuple[Sums, Sums, float]:
        """Of the windows that fit the change and of those that judge the ridge, and sum |target|^2."""
        taken: dict[str, Tensor] = {}  # of the last pass: a bypass may take one of its own
        inputs = input_size(module) + with_bias
        place = place_of_sums(inputs, self.device, self.group)
        fitting, judging = (Sums(inputs, self.hidden, place) for _ in range(2))
        size = torch.zeros((), dtype=torch.float64, device=place)
        handle = module.register_forward_hook(lambda _module, args, _output: taken.update(h=args[0]))
        targets: list[Tensor] = []
        try:
            for part, output in self._outputs(layer):
                target, h = self._target(part, point), taken["h"].view(*output.shape[:2], -1)
                if self.untouched is not None:
                    self.untouched.keep(target, point, targets)
                h = with_ones(h) if with_bias else h
                lacking = target.float() - output.float()
                size += target.double().pow(2).sum().to(place)
                judges = self.parts[part] % VALIDATION == VALIDATION - 1
                for sums, chosen in ((fitting, ~judges), (judging, judges)):
                    sums.add(h[chosen].flatten(0, 1), lacking[chosen].flatten(0, 1), share)
        finally:
            handle.remove()
        if self.untouched is not None:
            self.untouched.go(point, targets)
        self.group.sum([size, fitting.a, fitting.b, fitting.c, judging.a, judging.b, judging.c])
        return fitting, judging, float(size)

    def _advance(self, layer: int, point: int | None) -> float:
        """Go on behind `layer`, as it is now; sum |target - state|^2 there, where a point is given."""
        left, states = torch.zeros((), dtype=torch.float64, device=self.device), list[Tensor]()
        for part, output in self._outputs(layer):
            if point is not None:
                left += (self._target(part, point).float() - output.float()).double().pow(2).sum()
            if layer + 1 < self.walk.end:
                self.walk.keep(output, layer + 1, states)
        self.walk.go(layer + 1, states)
        self.group.sum([left])
        return float(left)


def _place(needed: int, device: torch.device) -> torch.device | None:
    """Where there is room for so many bytes: on the device, on the host, or nowhere."""
    places = (device, torch.device("cpu"))
    return next((place for place in places if needed <= STATES_SHARE * free_memory(place)), None)
