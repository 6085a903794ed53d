"""The naive twins of the fused ops: plain PyTorch that says what the other backends must compute.

Spec, eager baseline and oracle in one: half-precision and fp32 tensors are computed in fp32, fp64 tensors in fp64.
These are ordinary functions, not dispatcher ops, so autograd and torch.compile see through them.
"""

import torch
from torch import Tensor


def gated_residual(
    x: Tensor, out: Tensor, gate: Tensor, *, mode: str, norms: bool = True, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, l1, l2 as `trsp_fast.gated_residual` defines them; the arguments are taken as valid."""
    # As many axes as x: a 0-D gate would be rounded to bf16 before the product, a [1, ..., 1] gate promotes to fp32.
    gate = gate.reshape(-1, *[1] * (x.dim() - 1))
    y = gate * out
    if mode == "residual":
        y = y + (1 - gate) * x  # not x + gate * (out - x): that one is not exactly `out` at gate 1
    y = y.to(x.dtype)
    if not norms:
        return y, None, None
    return y, *residual_norms(x, out, token_mask=token_mask)


def residual_norms(x: Tensor, out: Tensor, *, token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """l1, l2 as `trsp_fast.residual_norms` defines them; the arguments are taken as valid."""
    d = out.to(torch.promote_types(out.dtype, torch.float32)) - x
    if token_mask is not None:
        # Selected before abs and square, so that neither sums nor gradients ever see what padding holds.
        d = torch.where(token_mask.broadcast_to(x.shape[:-1]).unsqueeze(-1), d, 0.0)
    d = d.flatten(1)
    return d.abs().sum(1), d.square().sum(1)
