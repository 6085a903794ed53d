"""residual_norms: how much a decoder layer changes its input, as two sums per sequence from one pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trsp_fast.ops import backends, reference

FORWARD = "(Tensor x, Tensor out, Tensor? token_mask) -> (Tensor l1, Tensor l2)"
BACKWARD = (
    "(Tensor x, Tensor out, Tensor? token_mask, Tensor? c1, Tensor? c2, bool need_dx, bool need_dout)"
    " -> (Tensor dx, Tensor dout)"
)


def residual_norms(
    x: Tensor, out: Tensor, *, token_mask: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of |d| and d*d per sequence, d = out - x in fp32: the residual penalty of TRSP (arXiv 2505.18232).

    Args:
        x: input of a decoder layer, (G, ..., H), one sequence per index of the first dimension; fp32, bf16, fp16 or
            fp64 (reference backend only, computed in fp64).
        out: output of that layer, like x.
        token_mask: bool, broadcastable to x.shape[:-1]; True keeps a token. It selects: what a dropped token holds,
            NaN included, reaches neither the sums nor the gradients.
        backend: "reference", "cpu" or "triton"; by default the fastest one on x's device.

    Returns:
        l1, l2: fp32 [G] (fp64 for fp64 inputs), differentiable once with respect to x and out; sign(0) counts as 0.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or a backend that is unknown or not available.
    """
    backends.check_pair(x, out)
    backends.check_mask(token_mask, x)
    backend = backends.choose(backend, x)
    if backend == "reference":
        return reference.residual_norms(x, out, token_mask=token_mask)
    if token_mask is not None:
        token_mask = token_mask.broadcast_to(x.shape[:-1]).contiguous()  # one copy serves forward and backward
    return _ResidualNorms.apply(x, out, token_mask, backend)


class _ResidualNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, token_mask: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, out, token_mask)
        ctx.backend = backend
        return backends.operator("residual_norms", backend)(x, out, token_mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c1: Tensor | None, c2: Tensor | None) -> tuple[Tensor | None, ...]:
        need_dx, need_dout = ctx.needs_input_grad[:2]
        backward = backends.operator("residual_norms", ctx.backend, backward=True)
        dx, dout = backward(*ctx.saved_tensors, c1, c2, need_dx, need_dout)
        return dx if need_dx else None, dout if need_dout else None, None, None


def _fake(x: Tensor, out: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


def _fake_backward(
    x: Tensor,
    out: Tensor,
    token_mask: Tensor | None,
    c1: Tensor | None,
    c2: Tensor | None,
    need_dx: bool,
    need_dout: bool,
) -> tuple[Tensor, Tensor]:
    return backends.states_if(need_dx, x), backends.states_if(need_dout, x)


def _triton(x: Tensor, out: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    from trsp_fast.kernels import residual_norms as kernels

    if x.numel() == 0:
        return x.new_zeros(x.shape[0], dtype=torch.float32), x.new_zeros(x.shape[0], dtype=torch.float32)
    with torch.cuda.device_of(x):
        return kernels.forward(x.contiguous(), out.contiguous(), backends.mask_bytes(token_mask, x))


def _triton_backward(
    x: Tensor,
    out: Tensor,
    token_mask: Tensor | None,
    c1: Tensor | None,
    c2: Tensor | None,
    need_dx: bool,
    need_dout: bool,
) -> tuple[Tensor, Tensor]:
    from trsp_fast.kernels import residual_norms as kernels

    dx, dout = backends.states_if(need_dx, x), backends.states_if(need_dout, x)
    if x.numel():
        with torch.cuda.device_of(x):
            kernels.backward(
                x.contiguous(), out.contiguous(), backends.mask_bytes(token_mask, x), c1, c2,
                dx if need_dx else None, dout if need_dout else None,
            )  # fmt: skip
    return dx, dout


backends.register("residual_norms", FORWARD, _fake, _triton)
backends.register("residual_norms", BACKWARD, _fake_backward, _triton_backward, backward=True)
