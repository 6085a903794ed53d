"""What stage 2 imitates: the untouched model, as a copy of it or as its states of every window, computed once.

The states before the head are all that its logits are made of, so that where the head is plain they stand for the whole
model: 2 bytes a number instead of a second model in memory, and no second forward pass from the second epoch on.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp_fast.engine.head import hidden_states, obstacle, output_head
from trsp_fast.models.families import layer_stack
from trsp_fast.ops.residual_norms import residual_norms


@dataclass(frozen=True)
class Targets:
    """Of some windows, in the untouched model.

    before_head: what its head is given, `[windows, seq, hidden]`; or else `logits`, `[windows, seq, vocabulary]`.
    inputs: by layer the hidden states that it is given; under the number of layers those that the last one hands on.
    """

    before_head: Tensor | None
    logits: Tensor | None
    inputs: dict[int, Tensor]


class InputTap:
    """Inside, what chosen layers of a model are given in its last forward pass, by layer; see `Targets.inputs`."""

    def __init__(self, model: PreTrainedModel, points: Iterable[int]) -> None:
        self._layers, self._points, self._hooks = layer_stack(model).layers, list(points), ExitStack()
        self.taken: dict[int, Tensor] = {}

    def __enter__(self) -> "InputTap":
        for point in self._points:
            if point < len(self._layers):
                handle = self._layers[point].register_forward_pre_hook(self._before(point), with_kwargs=True)
            else:
                handle = self._layers[-1].register_forward_hook(self._after(point))
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *_error: object) -> None:
        self._hooks.close()
        self.taken.clear()

    def _before(self, point: int) -> Any:
        def take(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.taken[point] = args[0] if args else kwargs["hidden_states"]

        return take

    def _after(self, point: int) -> Any:
        def take(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self.taken[point] = output[0] if isinstance(output, tuple) else output

        return take


class UntouchedModel:
    """A second model that is asked in every step.

    head: its head, where that is plain. held: bytes of memory that are there for it alone.
    """

    def __init__(self, model: PreTrainedModel, points: Sequence[int], held: int, *, whole: bool = False) -> None:
        """`whole`: its logits are taken as the model gives them, never made by its head alone."""
        self.model, self.points, self.held = model, points, held
        self.head = None if whole or obstacle(model) else output_head(model)

    @torch.no_grad()
    def targets(self, rows: Tensor, tokens: Tensor) -> Targets:
        """Of the windows `rows`, int64 `[windows]`, whose tokens are `[windows, seq]` on the device."""
        with InputTap(self.model, self.points) as tap:
            if self.head is None:
                logits = self.model(input_ids=tokens, use_cache=False).logits
                return Targets(None, logits, dict(tap.taken))
            return Targets(hidden_states(self.model, tokens), None, dict(tap.taken))


@dataclass
class StoredStates:
    """The states of all windows: on the model's device, or in host memory, pinned where the model is on a GPU.

    head: a copy that is not trained. before_head: `[samples, seq, hidden]`. inputs: by layer, as in `Targets`. held:
        bytes of device memory.
    """

    head: nn.Linear | None
    before_head: Tensor
    inputs: dict[int, Tensor]

    @property
    def held(self) -> int:
        tensors = [] if self.before_head.is_pinned() else [self.before_head, *self.inputs.values()]
        return sum(t.nbytes for t in tensors) + (self.head.weight.nbytes if self.head is not None else 0)

    def targets(self, rows: Tensor, tokens: Tensor) -> Targets:
        """As `UntouchedModel.targets`."""
        inputs = {point: self.state(rows, tokens, point) for point in self.inputs}
        return Targets(self._of(rows, self.before_head, tokens.device), None, inputs)

    def state(self, rows: Tensor, tokens: Tensor, point: int) -> Tensor:
        """One of `Targets.inputs`."""
        return self._of(rows, self.inputs[point], tokens.device)

    @staticmethod
    def _of(rows: Tensor, stored: Tensor, device: torch.device) -> Tensor:
        indices = rows.to(stored.device)
        return stored[indices] if stored.device == device else rows_on(stored, indices, device)


Teacher: TypeAlias = UntouchedModel | StoredStates


def rows_on(stored: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Rows of pinned host memory on a device; no copy waits for it."""
    chosen = torch.empty((len(rows), *stored.shape[1:]), dtype=stored.dtype, device=device)
    for row, index in enumerate(rows.tolist()):
        chosen[row].copy_(stored[index], non_blocking=True)
    return chosen


def stored_bytes(model: PreTrainedModel, tokens: Tensor, points: Sequence[int]) -> int:
    """Bytes that `store_states` would take for windows, int64 `[samples, seq]`."""
    config = model.config.get_text_config(decoder=True)
    head = output_head(model)
    return tokens.numel() * (head.in_features + config.hidden_size * len(points)) * head.weight.element_size()


@torch.no_grad()
def store_states(
    model: PreTrainedModel, tokens: Tensor, points: Sequence[int], batch: int, *, on_device: bool
) -> StoredStates:
    """What the model, which has a plain head and is not trained yet, makes of every window; `batch` windows a pass.

    `on_device`: kept on the model's device, else in host memory.
    """
    head, device = output_head(model), next(model.parameters()).device
    own = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta", dtype=head.weight.dtype)
    own.load_state_dict({name: tensor.detach().clone() for name, tensor in head.state_dict().items()}, assign=True)
    whole: dict[int | None, Tensor] = {}  # None: before the head

    def keep(point: int | None, states: Tensor, first: int) -> None:
        if point not in whole:
            place = device if on_device else torch.device("cpu")
            pinned = device.type == "cuda" and not on_device
            shape = (len(tokens), *states.shape[1:])
            whole[point] = torch.empty(shape, dtype=states.dtype, device=place, pin_memory=pinned)
        whole[point][first : first + len(states)].copy_(states)

    with InputTap(model, points) as tap:
        for first in range(0, len(tokens), batch):
            keep(None, hidden_states(model, tokens[first : first + batch].to(device)), first)
            for point in points:
                keep(point, tap.taken[point], first)
    states = whole.pop(None)
    return StoredStates(own.requires_grad_(False), states, {point: whole[point] for point in points})


def hidden_distance(student: dict[int, Tensor], teacher: dict[int, Tensor]) -> Tensor:
    """How far hidden states are from those of the teacher, relative to these; 0-D.

    Mean over layers and sequences of |student - teacher|^2 / |teacher|^2; the difference is never stored
    (`trsp_fast.ops.residual_norms`).
    """
    distances = []
    for point, target in teacher.items():
        size = target.float().pow(2).flatten(1).sum(1)
        # in the student's dtype: rounding what is large in its state to the teacher's would outweigh the difference
        _, squared = residual_norms(target.to(student[point].dtype), student[point])
        distances.append((squared / size).mean())
    return torch.stack(distances).mean()
