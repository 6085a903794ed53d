"""Gated output and both sums of the residual in one pass over x and out, and all gradients in one pass back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trsp_fast.kernels.residual_norms import (
    load_keep,
    load_states,
    locate_tile,
    penalty,
    store_norms,
    stride,
    sum_tiles,
    tiling,
)


@triton.jit(do_not_specialize=["gate_stride"])
def forward_kernel(
    x_ptr, out_ptr, gate_ptr, mask_ptr, y_ptr, partials_ptr, gate_stride, tokens, hidden, tiles, column_tiles,
    RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, EVICTION: tl.constexpr
):  # fmt: skip
    """Reads x and out, writes y: 6 bytes per bf16 element; 4 in output mode without sums, where x is not read."""
    sequence, token, first, offsets, inside = locate_tile(tokens, hidden, tiles, column_tiles, BLOCK_T, BLOCK_H)
    gate = tl.load(gate_ptr + sequence * gate_stride)
    out = load_states(out_ptr, first, offsets, inside, EVICTION)
    y = gate * out
    kept = inside
    if mask_ptr is not None:
        kept = inside & load_keep(mask_ptr, sequence, token, tokens, BLOCK_T)
    if x_ptr is not None:
        x = load_states(x_ptr, first, offsets, inside if RESIDUAL else kept, EVICTION)
        if RESIDUAL:
            # Gates 1 and 0 choose a side instead of adding a zero: that keeps the bits, the sign of -0 included.
            if gate == 0.0:
                y = x
            elif gate != 1.0:
                y += (1.0 - gate) * x
        if partials_ptr is not None:
            store_norms(partials_ptr, tl.where(kept, out - x, 0.0))
    tl.store(y_ptr + first + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["gate_stride", "c1_stride", "c2_stride"])
def backward_kernel(
    dy_ptr, x_ptr, out_ptr, gate_ptr, mask_ptr, c1_ptr, c2_ptr, dx_ptr, dout_ptr, partials_ptr,
    gate_stride, c1_stride, c2_stride, tokens, hidden, tiles, column_tiles,
    RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, EVICTION: tl.constexpr
):  # fmt: skip
    """Reads dy, x and out, writes dx and dout: 10 bytes per bf16 element; a pointer that is None costs nothing."""
    sequence, token, first, offsets, inside = locate_tile(tokens, hidden, tiles, column_tiles, BLOCK_T, BLOCK_H)
    gate = tl.load(gate_ptr + sequence * gate_stride)
    dy = load_states(dy_ptr, first, offsets, inside, EVICTION)
    dout = gate * dy
    dx = tl.zeros_like(dy)
    if RESIDUAL:
        dx = (1.0 - gate) * dy
    kept = inside
    if mask_ptr is not None:
        kept = inside & load_keep(mask_ptr, sequence, token, tokens, BLOCK_T)
    if out_ptr is not None:
        out = load_states(out_ptr, first, offsets, kept if partials_ptr is None else inside, EVICTION)
        d = out
        if x_ptr is not None:
            d = out - load_states(
                x_ptr, first, offsets, inside if RESIDUAL and partials_ptr is not None else kept, EVICTION
            )
        if partials_ptr is not None:
            if RESIDUAL:
                tl.store(partials_ptr + tl.program_id(0), tl.sum(dy * d))
            else:
                tl.store(partials_ptr + tl.program_id(0), tl.sum(dy * out))
        if c1_ptr is not None or c2_ptr is not None:
            p = tl.where(kept, penalty(d, c1_ptr, c2_ptr, c1_stride, c2_stride, sequence), 0.0)
            dout += p
            dx -= p
    if dx_ptr is not None:
        tl.store(dx_ptr + first + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    if dout_ptr is not None:
        tl.store(dout_ptr + first + offsets, dout.to(dout_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor | None, out: Tensor, gate: Tensor, token_mask: Tensor | None, y: Tensor, *, residual: bool, norms: bool
) -> tuple[Tensor, ...]:
    """Fills y; gives l1 and l2, fp32 [G], or nothing. Tensors are contiguous, the mask is uint8; x None: not read."""
    sizes = tiling(out, token_mask is not None, sums=norms)
    partials = out.new_empty((2, out.shape[0], sizes["tiles"]), dtype=torch.float32) if norms else None
    forward_kernel[(out.shape[0] * sizes["tiles"],)](
        x, out, gate, token_mask, y, partials, stride(gate), RESIDUAL=residual, **sizes
    )
    return () if partials is None else sum_tiles(partials)


def backward(
    dy: Tensor, x: Tensor | None, out: Tensor | None, gate: Tensor, token_mask: Tensor | None,
    c1: Tensor | None, c2: Tensor | None, dx: Tensor | None, dout: Tensor | None, *, residual: bool, need_dgate: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    """Fills the gradients that are not None; gives the gate's gradient, fp32 of the gate's shape, or nothing."""
    sizes = tiling(dy, token_mask is not None, sums=need_dgate)
    partials = dy.new_empty((1, dy.shape[0], sizes["tiles"]), dtype=torch.float32) if need_dgate else None
    backward_kernel[(dy.shape[0] * sizes["tiles"],)](
        dy, x, out, gate, token_mask, c1, c2, dx, dout, partials, stride(gate), stride(c1), stride(c2),
        RESIDUAL=residual, **sizes,
    )  # fmt: skip
    if partials is None:
        return ()
    if gate.dim() == 0:  # one gate for all sequences: one sum over all tiles
        return (sum_tiles(partials.view(1, 1, -1))[0].view(()),)
    return sum_tiles(partials)
