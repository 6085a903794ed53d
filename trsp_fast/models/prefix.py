"""Forward passes that begin above frozen layers, from the hidden states that these layers hand on."""

from collections.abc import Iterable, Iterator, MutableMapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp_fast.engine.objective import INFERENCE_BATCH, language_model_loss
from trsp_fast.errors import UserError
from trsp_fast.models.bypass import Identity, is_bypassed, replace_forward, restore_forward
from trsp_fast.models.families import layer_stack
from trsp_fast.models.free_memory import free_memory
from trsp_fast.models.gates import as_layers_have_it, sequences_first
from trsp_fast.models.gathering import is_divided
from trsp_fast.run.events import Events

DEVICE_SHARE = 0.25  # of the free device memory that kept states may take by default: activations need the rest
HOST_SHARE = 0.5  # of the available host memory


class Prefix:
    """Runs the lower layers of a model alone, and the upper ones without them.

    The layer just below the first one that runs hands the states on in place of its own output, and those below it are
    bypassed. A pre-hook on the first one would do for the forward pass, but not where a checkpoint with the hooks
    inside (transformers 5.17) computes that layer again, in a backward pass after the hook is gone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.stack = model, layer_stack(model)
        self._identities: dict[int, Identity] = {}

    def alive(self, start: int, end: int) -> int:
        """How many of the layers from `start` to before `end` are not bypassed."""
        return sum(not is_bypassed(layer) for layer in self.stack.layers[start:end])

    @contextmanager
    def skipped(self, first: int, states: Tensor | None, gone: Iterable[int] = ()) -> Iterator[None]:
        """Forward passes inside begin at layer `first`, which gets `states` (as layers have them); `gone` is bypassed.

        With `first` = 0 they begin as always. Passes must be on the windows that the states belong to, without a cache.
        """
        forwards: dict[int, Any] = {index: self._identity(index) for index in {*range(first), *gone}}
        if first:
            assert states is not None
            forwards[first - 1] = _hand_on(forwards[first - 1], states)
        with ExitStack() as undo:
            for index, forward in forwards.items():
                layer = self.stack.layers[index]
                undo.callback(restore_forward, layer, replace_forward(layer, forward))
            yield

    def entering(self, tokens: Tensor, layer: int, start: int = 0, states: Tensor | None = None) -> Tensor:
        """The states that enter `layer`, by a pass that ends there; it begins at `start` with `states` if given."""

        def stop(_module: nn.Module, _args: tuple, output: Any) -> None:
            raise _ReachedError(output[0] if isinstance(output, tuple) else output)

        assert layer > start
        with self.skipped(start, states):  # before the hook: a bypass may take a pass of its own
            handle = self.stack.layers[layer - 1].register_forward_hook(stop)
            try:
                self.model(input_ids=tokens, use_cache=False)
            except _ReachedError as reached:
                return reached.states
            finally:
                handle.remove()
        raise AssertionError(f"the forward pass did not come to layer {layer - 1}")

    @torch.no_grad()
    def highest(self, tokens: Tensor) -> int:
        """The highest layer that needs nothing but hidden states from the layers below it.

        Gemma 3n and 4 put the keys and values that later layers share into a dictionary that all layers get.
        """
        filled: list[int] = []

        def look(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            containers = [v for v in (*args, *kwargs.values()) if isinstance(v, MutableMapping | MutableSequence)]
            filled.append(sum(map(len, containers)))

        handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in self.stack.layers]
        try:
            self.model(input_ids=tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return max(index for index, entries in enumerate(filled) if entries == filled[0])

    @torch.no_grad()
    def agrees(self, tokens: Tensor, first: int, states: Tensor, gone: Iterable[int] = ()) -> bool:
        """Whether the loss from `states` on is that of the whole pass.

        Bit for bit where the whole pass repeats itself; else (atomic sums on a GPU) to the rounding of a mean over many
        tokens, 1e-6 of it in fp32 and 5e-4 in bf16.
        """
        gone = list(gone)
        with self.skipped(first, states.clone(), gone):
            upper = language_model_loss(self.model, tokens)
        with self.skipped(0, None, gone):
            whole = language_model_loss(self.model, tokens)
            if torch.equal(upper, whole) or torch.equal(language_model_loss(self.model, tokens), whole):
                return torch.equal(upper, whole)
        rounding = max(1e-6, torch.finfo(states.dtype).eps / 16)
        return bool((whole - upper).abs() <= rounding * whole.abs())

    def _identity(self, index: int) -> Identity:
        """Made once per layer: to learn what a layer returns may take a forward pass."""
        current = self.stack.layers[index].__dict__.get("forward")
        if isinstance(current, Identity):
            return current
        if index not in self._identities:
            self._identities[index] = Identity(self.model, self.stack, index)
        return self._identities[index]


class PrefixStates:
    """The hidden states that enter layer `first`, kept for every calibration window.

        prefix = PrefixStates.build(model, tokens, first, events)
        with prefix.rows(indices) if prefix else nullcontext():
            loss = model(input_ids=tokens[indices], labels=tokens[indices], use_cache=False).loss

    Losses and gradients inside are those without it: bit for bit where a batch has as many windows as one of `build`
    (fewer or more change how matrices are multiplied), else to rounding. The hooks of `LayerGates` see the kept states
    as the input of layer `first`; no norms may be asked of the layers below. What the states depend on must not change:
    weights below `first`, and which layers there are bypassed.
    """

    def __init__(self, prefix: Prefix, first: int, kept: Tensor, device: torch.device) -> None:
        self.first, self.kept = first, kept
        self._prefix, self._device = prefix, device

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        tokens: Tensor,
        first: int,
        events: Events | None = None,
        *,
        batch: int = INFERENCE_BATCH,
        budget: int | None = None,
    ) -> "PrefixStates | None":
        """Compute the states once; None where that gains nothing, or (with a note) where it cannot be done.

        Args:
            tokens: calibration windows, int64 `[samples, seq]`.
            first: the first layer with a gate or with weights that are trained.
            batch: windows per forward pass; the same as in later steps makes these exact.
            budget: bytes of device memory for the states, a quarter of what is free by default; beyond it they are kept
                in host memory, pinned for a GPU. On a CPU both are the same, half of what is available.
        """
        prefix, events = Prefix(model), events or Events()
        if first == 0 or not prefix.alive(0, first):
            return None
        device = next(model.parameters()).device
        if is_divided(model):
            events.note(f"the layers below layer {first} are computed anew in every step: their weights are divided.")
            return None
        beginning = tokens[:batch].to(device)
        reason = _obstacle(prefix, beginning, first)
        kept = None if reason else _room(prefix, beginning[:1], first, len(tokens), budget)
        if kept is None:
            reason = reason or "their output does not fit into the memory that is free"
            events.note(f"the layers below layer {first} are computed anew in every step: {reason}.")
            return None
        with torch.no_grad():
            for number, part in enumerate(tokens.split(batch)):
                states = sequences_first(prefix.entering(part.to(device), first))
                kept[number * batch : number * batch + len(part)].copy_(states)
        where = "device" if kept.device == states.device else "host"
        events.emit("prefix", first=first, samples=len(kept), bytes=kept.nbytes, memory=where)
        return cls(prefix, first, kept, states.device)

    @contextmanager
    def rows(self, indices: Tensor | Sequence[int]) -> Iterator[None]:
        """Forward passes inside, on the windows `indices` in this order, begin at layer `first`.

        Raises:
            UserError: at the forward pass, if it is on more or fewer windows, or uses a KV cache.
        """
        states = as_layers_have_it(self._chosen(torch.as_tensor(indices))).contiguous()
        with self._prefix.skipped(self.first, states):
            yield

    def _chosen(self, indices: Tensor) -> Tensor:
        """One copy a row: from pinned memory it needs no gathered copy on the host and does not wait."""
        chosen = torch.empty((len(indices), *self.kept.shape[1:]), dtype=self.kept.dtype, device=self._device)
        for row, index in enumerate(indices.tolist()):
            chosen[row].copy_(self.kept[index], non_blocking=True)
        return chosen


class _ReachedError(Exception):
    """Ends a forward pass where the rest of it is not wanted."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def _hand_on(identity: Identity, states: Tensor) -> Any:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.shape != states.shape:
            raise UserError(
                f"the forward pass has hidden states of {list(hidden_states.shape)}, those kept for its windows "
                f"{list(states.shape)}; run it on exactly the windows whose rows were given."
            )
        return identity(states, *args, **kwargs)

    return forward


def _obstacle(prefix: Prefix, tokens: Tensor, first: int) -> str | None:
    """Why passes cannot begin at `first`, found by trying: on one window for gradients, on all for the loss."""
    highest = prefix.highest(tokens[:1])
    if first > highest:
        return f"layer {highest} hands on more than hidden states, such as keys and values that later layers share"
    with torch.enable_grad():
        states = prefix.entering(tokens[:1], first)
    if _depends_on_parameter(states):
        return "a weight or a gate there is trained"
    with torch.no_grad():
        states = prefix.entering(tokens, first)
    return None if prefix.agrees(tokens, first, states) else "the loss from their kept output on is another"


def _depends_on_parameter(states: Tensor) -> bool:
    """Whether a backward pass would come to a parameter; transformers may let the embeddings' output want gradients."""
    seen, nodes = set(), [states.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            if isinstance(getattr(node, "variable", None), nn.Parameter):
                return True
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    return False


def _room(prefix: Prefix, window: Tensor, first: int, samples: int, budget: int | None) -> Tensor | None:
    """Empty memory for the states of all windows, sequences first; None where it is too little."""
    with torch.no_grad():
        states = sequences_first(prefix.entering(window, first))
    shape, needed = (samples, *states.shape[1:]), samples * states.nbytes
    on_gpu = states.device.type == "cuda"
    if on_gpu:
        free = free_memory(states.device) * DEVICE_SHARE
        if needed <= (free if budget is None else budget):
            return torch.empty(shape, dtype=states.dtype, device=states.device)
    if needed > free_memory() * HOST_SHARE:
        return None
    return torch.empty(shape, dtype=states.dtype, pin_memory=on_gpu)
