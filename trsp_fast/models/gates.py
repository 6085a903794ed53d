"""Gates on decoder layers and the difference between a layer's input and output."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp_fast.errors import UserError
from trsp_fast.models.bypass import ABSENT, Identity, replace_forward, restore_forward
from trsp_fast.models.bypass import bypassed as bypassed
from trsp_fast.models.families import layer_stack
from trsp_fast.models.gathering import gather_before_backward, is_divided
from trsp_fast.ops import gated_residual, residual_norms


class LayerGates:
    """One learnable gate per decoder layer, by forward hooks that call the fused ops; leaves no trace on exit.

        with LayerGates(model, mode="residual") as gates:
            loss = model(input_ids=batch, labels=batch).loss + 1e-3 * gates.values.abs().sum()
            loss.backward()                      # gates.values.grad, gates.gradients(): one row per sequence
            distance = gates.distances("l2")     # {layer: D}
            gates.bypass([3, 6])

    Both non-reentrant gradient checkpointing and none give the same loss and gradients; norms are collected by layer
    index, once per forward pass, wherever transformers runs the hooks (5.17: inside the checkpoint, 5.23: outside).

    Args:
        model: a transformers causal language model with L decoder layers.
        mode: "residual" (a layer becomes gate*out + (1-gate)*x), "output" (gate*out, arXiv 2505.18232), or None: no
            gates, only the norms.
        layers: the layers concerned; all of them by default.
        norms: collect the l1 and l2 difference between input and output of these layers.
        detach_norms: the norms' gradient reaches the layer's own weights only: they are taken from a second evaluation
            of the layer on its detached input. Bypassed layers have norms too then: this evaluation is all they do.
        backend: passed to the fused ops.

    Raises:
        UserError: a layer out of range, or re-entrant gradient checkpointing, seen at the first forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        mode: str | None = "residual",
        layers: Iterable[int] | None = None,
        norms: bool = True,
        detach_norms: bool = False,
        backend: str | None = None,
    ) -> None:
        self.stack = layer_stack(model)
        self.layers = sorted(set(range(len(self.stack)) if layers is None else layers))
        if self.layers and not 0 <= self.layers[0] <= self.layers[-1] < len(self.stack):
            raise UserError(f"layers are {self.layers}; this model has layers 0 to {len(self.stack) - 1}.")
        if mode not in ("residual", "output", None):
            raise UserError(f"mode is {mode!r}; it must be 'residual', 'output' or None.")
        self.mode, self.with_norms, self.detach_norms, self.backend = mode, norms, detach_norms, backend
        device = next(model.parameters()).device  # the layers' weights may stay in host memory
        self.values = nn.Parameter(torch.ones(len(self.stack), dtype=torch.float32, device=device))
        self._bypassed: dict[int, Any] = {}
        self._model = model
        self._handles: list[Any] = []
        self._neutral = False
        self._begin(None)

    def __enter__(self) -> "LayerGates":
        # A composite model hands its text model masks that are prepared already: the plain one is the outermost's.
        self._handles = [
            module.register_forward_pre_hook(
                lambda _module, _args, kwargs, inner=inner: self._begin(kwargs.get("attention_mask"), inner),
                with_kwargs=True,
            )
            for module, inner in ((self._model, False), (self.stack.owner, True))
        ]
        for index in self.layers:
            layer, hook = self.stack.layers[index], self._layer_hook(index)
            # Before FSDP's own hook, which lets go of the weights that the second evaluation of the layer needs
            handle = layer.register_forward_hook(hook, with_kwargs=True, prepend=is_divided(layer))
            self._handles.append(handle)
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.restore(list(self._bypassed))
        self._begin(None)

    def bypass(self, layers: Iterable[int]) -> None:
        """Make `layers` the identity, at no cost per forward pass, until `restore` or the end of the context."""
        for index in layers:
            if index not in self._bypassed:
                identity = Identity(self._model, self.stack, index)
                self._bypassed[index] = replace_forward(self.stack.layers[index], identity)

    def restore(self, layers: Iterable[int]) -> None:
        """Undo `bypass`."""
        for index in list(layers):
            restore_forward(self.stack.layers[index], self._bypassed.pop(index))

    @contextmanager
    def neutral(self) -> Iterator[None]:
        """The model without gates and norms inside; bypassed layers stay bypassed."""
        self._neutral = True
        try:
            yield
        finally:
            self._neutral = False

    @property
    def bypassed(self) -> list[int]:
        return sorted(self._bypassed)

    def norms(self) -> dict[int, tuple[Tensor, Tensor]]:
        """(l1, l2) of each layer in the last forward pass: fp32 `[G]`, sums over one sequence's kept elements."""
        return dict(self._norms)

    def distances(self, norm: str = "l2") -> dict[int, Tensor]:
        """D of each layer in the last forward pass, a differentiable 0-D fp32 tensor (see `distance`)."""
        return {index: distance(*self._norms[index], self._elements[index], norm) for index in sorted(self._norms)}

    def gradients(self) -> Tensor | None:
        """Gradient of the last backward pass by sequence and gate: fp32 `[G, L]`; its sum over G is the gates' own."""
        return None if self._rows is None else self._rows.grad

    def _begin(self, attention_mask: Any, inner: bool = False) -> None:
        """Forget the last forward pass. The rows [G, L] of gates are made when the first layer tells G."""
        self._norms: dict[int, tuple[Tensor, Tensor]] = {}
        self._elements: dict[int, Tensor | int] = {}
        self._rows: Tensor | None = None
        self._columns: tuple[Tensor, ...] = ()
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            self._mask: Tensor | None = attention_mask
        elif not inner:
            self._mask = None

    def _gate(self, index: int, sequences: int) -> Tensor:
        """The gate of one layer, fp32 `[G]`: one unbind per forward pass, rows kept for per-sequence gradients."""
        if self._rows is None:
            self._rows = self.values.expand(sequences, -1)
            if self._rows.requires_grad:
                self._rows.retain_grad()
            self._columns = self._rows.unbind(1)
        return self._columns[index]

    def _layer_hook(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            if self._neutral or (index in self._bypassed and not self.detach_norms):
                return None
            _refuse_reentrant(module)
            x = args[0] if args else kwargs["hidden_states"]
            if index in self._bypassed:
                self._collect(index, sequences_first(x), *self._detached_norms(index, x, args, kwargs))
                return None
            out = output[0] if isinstance(output, tuple) else output
            y = self._apply(index, x, out, args, kwargs)
            if y is None:
                return None
            y = as_layers_have_it(y)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return hook

    def _apply(self, index: int, x: Tensor, out: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """The gated output, or None where the layer's own output stays; the norms are put down by layer index."""
        states, out = sequences_first(x), sequences_first(out)
        mask = self._token_mask(states)
        fused = self.with_norms and not self.detach_norms
        y = l1 = l2 = None
        if self.mode is not None:
            gate = self._gate(index, states.shape[0]).to(x.device)
            y, l1, l2 = gated_residual(
                states, out, gate, mode=self.mode, norms=fused, token_mask=mask if fused else None, backend=self.backend
            )
        elif fused:
            l1, l2 = residual_norms(states, out, token_mask=mask, backend=self.backend)
        if self.with_norms and self.detach_norms:
            l1, l2 = self._detached_norms(index, x, args, kwargs)
        self._collect(index, states, l1, l2)
        return y

    def _collect(self, index: int, x: Tensor, l1: Tensor | None, l2: Tensor | None) -> None:
        """Put the norms down. With hooks inside the checkpoint the recompute comes here again: the first ones stay."""
        if l1 is not None and l2 is not None and index not in self._norms:
            self._norms[index] = (l1, l2)
            self._elements[index] = _kept_elements(x, self._token_mask(x))

    def _token_mask(self, x: Tensor) -> Tensor | None:
        """Which tokens count, broadcastable to `x` (sequences first) without its hidden dimension."""
        if self._mask is None:
            return None
        mask = self._mask[:, -x.shape[-2] :].bool()
        return mask.view(len(mask), *[1] * (x.dim() - 3), -1)

    def _detached_norms(
        self, index: int, x: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        if not self.with_norms:
            return None, None
        layer, x = self.stack.layers[index], x.detach()
        forward = self._bypassed.get(index, layer.forward)  # what the bypass replaced
        if forward is ABSENT:
            forward = functools.partial(type(layer).forward, layer)
        output = forward(x, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"})
        out = output[0] if isinstance(output, tuple) else output
        x, out = sequences_first(x), sequences_first(out)
        l1, l2 = residual_norms(x, out, token_mask=self._token_mask(x), backend=self.backend)
        gather_before_backward(layer, l1, l2)
        return l1, l2


def distance(l1: Tensor, l2: Tensor, elements: Tensor | int, norm: str) -> Tensor:
    """D of one layer, the mean over sequences of `l2`: sqrt(l2/n), `l1`: l1/n, `frobenius`: sqrt(l2); n = elements.

    The root's gradient is 0 at 0. `frobenius` is the authors' code for one sequence per step.
    """
    if norm == "l1":
        return (l1 / elements).mean()
    squared = l2 if norm == "frobenius" else l2 / elements
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0).mean()


def _kept_elements(x: Tensor, mask: Tensor | None) -> Tensor | int:
    """Elements per sequence that the mask keeps: an int, or fp32 `[G]` of at least 1."""
    if mask is None:
        return max(1, x[0].numel()) if len(x) else 1
    per_token = x[0].numel() // x.shape[-2] if x.numel() else 1
    return (mask.flatten(1).sum(1) * per_token).clamp(min=1).float()


def sequences_first(states: Tensor) -> Tensor:
    """Hidden states as (G, ..., S, H). Gemma 3n keeps several streams of every token: (streams, G, S, H)."""
    return states if states.dim() <= 3 else states.movedim(-3, 0)


def as_layers_have_it(states: Tensor) -> Tensor:
    """The inverse of `sequences_first`."""
    return states if states.dim() <= 3 else states.movedim(0, -3)


def _refuse_reentrant(layer: nn.Module) -> None:
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    if not (checkpoint and layer.training and getattr(layer, "gradient_checkpointing", False)):
        return
    if getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
        raise UserError(
            "gradient checkpointing is re-entrant, which drops the penalty's gradient; enable it with "
            'gradient_checkpointing_enable({"use_reentrant": False}).'
        )
