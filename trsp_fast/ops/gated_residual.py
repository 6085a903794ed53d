"""gated_residual: a decoder layer's output weighted by its gate, and how much the layer changes, from one pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trsp_fast.ops import backends, reference

MODES = ("output", "residual")

FORWARD = (
    "(Tensor x, Tensor out, Tensor gate, Tensor? token_mask, bool residual, bool norms)"
    " -> (Tensor y, Tensor l1, Tensor l2)"
)
BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor? out, Tensor gate, Tensor? token_mask, Tensor? c1, Tensor? c2,"
    " bool residual, bool need_dx, bool need_dout, bool need_dgate) -> (Tensor dx, Tensor dout, Tensor dgate)"
)


def gated_residual(
    x: Tensor,
    out: Tensor,
    gate: Tensor,
    *,
    mode: str,
    norms: bool = True,
    token_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gate a decoder layer and measure its residual d = out - x (TRSP, arXiv 2505.18232); computed in fp32.

    Args:
        x: input of a decoder layer, (G, ..., H), one sequence per index of the first dimension; fp32, bf16, fp16 or
            fp64 (reference backend only, computed in fp64).
        out: output of that layer, like x.
        gate: fp32, 0-D or [G] (one value per sequence, and then one gradient per sequence). fp64 with fp64 states.
        mode: "output" gives y = gate*out (the paper), "residual" gives y = gate*out + (1-gate)*x, which is exactly out
            at gate 1 and exactly x at gate 0.
        norms: False leaves the sums out; l1 and l2 are then None, and output mode does not read x.
        token_mask: bool, broadcastable to x.shape[:-1]; True keeps a token in l1 and l2. It selects: what a dropped
            token holds, NaN included, reaches neither the sums nor their gradients. y and its gradients ignore it.
        backend: "reference", "cpu" or "triton"; by default the fastest one on x's device.

    Returns:
        y: like x, contiguous, never an alias of x or out. l1, l2: fp32 [G] (fp64 for fp64 inputs), the sums of |d| and
        d*d per sequence. Differentiable once with respect to x, out and gate; sign(0) counts as 0.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, an unknown mode, or a backend that is unknown or
            not available.
    """
    backends.check_pair(x, out)
    _check_gate(gate, x)
    if mode not in MODES:
        raise ValueError(f"mode must be 'output' or 'residual', got {mode!r}; pass one of them.")
    backends.check_mask(token_mask, x)
    backend = backends.choose(backend, x)
    if backend == "reference":
        return reference.gated_residual(x, out, gate, mode=mode, norms=norms, token_mask=token_mask)
    if token_mask is not None and norms:
        token_mask = token_mask.broadcast_to(x.shape[:-1]).contiguous()  # one copy serves forward and backward
    result = _GatedResidual.apply(x, out, gate, token_mask if norms else None, backend, mode == "residual", norms)
    return result if norms else (result, None, None)


def _check_gate(gate: Tensor, x: Tensor) -> None:
    if not isinstance(gate, Tensor):
        raise ValueError(
            f"gate must be a tensor, got {type(gate).__name__}; pass torch.tensor(value, dtype=torch.float32)."
        )
    if gate.dtype != torch.float32 and not gate.dtype == x.dtype == torch.float64:
        raise ValueError(f"gate must be float32, got {gate.dtype}; gates stay in fp32 whatever the dtype of x.")
    if gate.dim() != 0 and gate.shape != x.shape[:1]:
        raise ValueError(
            f"gate must be 0-D or have shape ({x.shape[0]},), got {tuple(gate.shape)}; pass one per sequence."
        )
    if gate.device != x.device:
        raise ValueError(f"gate must be on x's device {x.device}, got {gate.device}; move it there.")


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        out: Tensor,
        gate: Tensor,
        token_mask: Tensor | None,
        backend: str,
        residual: bool,
        norms: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        need_dx, need_dout, need_dgate = ctx.needs_input_grad[:3]
        penalised = norms and (need_dx or need_dout)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if penalised or (residual and need_dgate) else None,
            out if penalised or need_dgate else None,
            gate,
            token_mask if penalised else None,
        )
        ctx.backend, ctx.residual = backend, residual
        y, l1, l2 = backends.operator("gated_residual", backend)(x, out, gate, token_mask, residual, norms)
        if not norms:
            return y
        if not penalised:
            ctx.mark_non_differentiable(l1, l2)
        return y, l1, l2

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, c1: Tensor | None = None, c2: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        x, out, gate, token_mask = ctx.saved_tensors
        need_dx, need_dout, need_dgate = ctx.needs_input_grad[:3]
        penalised = (c1 is not None or c2 is not None) and (need_dx or need_dout)
        dx = dout = dgate = None
        if dy is not None:
            need_dx = need_dx and (ctx.residual or penalised)  # else y does not depend on x
            dx, dout, dgate = backends.operator("gated_residual", ctx.backend, backward=True)(
                dy, x, out, gate, token_mask, c1, c2, ctx.residual, need_dx, need_dout, need_dgate
            )
        elif penalised:
            need_dgate = False
            dx, dout = backends.operator("residual_norms", ctx.backend, backward=True)(
                x, out, token_mask, c1, c2, need_dx, need_dout
            )
        return (
            dx if need_dx else None,
            dout if need_dout else None,
            dgate if need_dgate else None,
            None,
            None,
            None,
            None,
        )


def _fake(
    x: Tensor, out: Tensor, gate: Tensor, token_mask: Tensor | None, residual: bool, norms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sums = x.shape[0] if norms else 0
    return out.new_empty(out.shape), out.new_empty(sums, dtype=torch.float32), out.new_empty(sums, dtype=torch.float32)


def _fake_backward(
    dy: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    gate: Tensor,
    token_mask: Tensor | None,
    c1: Tensor | None,
    c2: Tensor | None,
    residual: bool,
    need_dx: bool,
    need_dout: bool,
    need_dgate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dgate = dy.new_empty(gate.shape if need_dgate else 0, dtype=torch.float32)
    return backends.states_if(need_dx, dy), backends.states_if(need_dout, dy), dgate


def _triton(
    x: Tensor, out: Tensor, gate: Tensor, token_mask: Tensor | None, residual: bool, norms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from trsp_fast.kernels import gated_residual as kernels

    y, l1, l2 = _fake(x, out, gate, token_mask, residual, norms)
    if out.numel() == 0:
        return y, l1.zero_(), l2.zero_()
    with torch.cuda.device_of(out):
        found = kernels.forward(
            x.contiguous() if residual or norms else None, out.contiguous(), gate,
            backends.mask_bytes(token_mask, out) if norms else None, y, residual=residual, norms=norms,
        )  # fmt: skip
    if norms:
        l1, l2 = found
    return y, l1, l2


def _triton_backward(
    dy: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    gate: Tensor,
    token_mask: Tensor | None,
    c1: Tensor | None,
    c2: Tensor | None,
    residual: bool,
    need_dx: bool,
    need_dout: bool,
    need_dgate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from trsp_fast.kernels import gated_residual as kernels

    penalised = (c1 is not None or c2 is not None) and (need_dx or need_dout)
    if not (penalised or need_dgate):
        out = None
    if not (penalised or (residual and need_dgate)):
        x = None
    dx, dout, dgate = _fake_backward(dy, x, out, gate, token_mask, c1, c2, residual, need_dx, need_dout, need_dgate)
    if dy.numel() == 0:
        return dx, dout, dgate.zero_()
    with torch.cuda.device_of(dy):
        found = kernels.backward(
            dy.contiguous(), None if x is None else x.contiguous(), None if out is None else out.contiguous(), gate,
            backends.mask_bytes(token_mask, dy) if penalised else None,
            c1 if penalised else None, c2 if penalised else None,
            dx if need_dx else None, dout if need_dout else None, residual=residual, need_dgate=need_dgate,
        )  # fmt: skip
    return dx, dout, found[0] if found else dgate


backends.register("gated_residual", FORWARD, _fake, _triton)
backends.register("gated_residual", BACKWARD, _fake_backward, _triton_backward, backward=True)
