"""Gated output and both sums of the residual in one pass over x and out, and all gradients in one pass back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trsp_fast.kernels.residual_norms import (
    WARPS,
    load_keep,
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
    RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """Reads x and out, writes y: 6 bytes per bf16 element; 4 in output mode without sums, where x is not read."""
    sequence, token, first, offsets, inside = locate_tile(tokens, hidden, tiles, column_tiles, BLOCK_T, BLOCK_H)
    gate = tl.load(gate_ptr + sequence * gate_stride)
    out = tl.load(out_ptr + first + offsets, mask=inside, other=0.0).to(tl.float32)
    y = gate * out
    if x_ptr is not None:
        x = tl.load(x_ptr + first + offsets, mask=inside, other=0.0).to(tl.float32)
        if RESIDUAL:
            # Gates 1 and 0 choose a side instead of adding a zero: that keeps the bits, the sign of -0 included.
            y = tl.where(gate == 1.0, out, tl.where(gate == 0.0, x, y + (1.0 - gate) * x))
        if partials_ptr is not None:
            d = out - x
            if mask_ptr is not None:
                d = tl.where(load_keep(mask_ptr, sequence, token, tokens, BLOCK_T), d, 0.0)
            store_norms(partials_ptr, d)
    tl.store(y_ptr + first + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["gate_stride", "c1_stride", "c2_stride"])
def backward_kernel(
    dy_ptr, x_ptr, out_ptr, gate_ptr, mask_ptr, c1_ptr, c2_ptr, dx_ptr, dout_ptr, partials_ptr,
    gate_stride, c1_stride, c2_stride, tokens, hidden, tiles, column_tiles,
    RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """Reads dy, x and out, writes dx and dout: 10 bytes per bf16 element; a pointer that is None costs nothing."""
    sequence, token, first, offsets, inside = locate_tile(tokens, hidden, tiles, column_tiles, BLOCK_T, BLOCK_H)
    gate = tl.load(gate_ptr + sequence * gate_stride)
    dy = tl.load(dy_ptr + first + offsets, mask=inside, other=0.0).to(tl.float32)
    dout = gate * dy
    dx = tl.zeros_like(dy)
    if RESIDUAL:
        dx = (1.0 - gate) * dy
    if out_ptr is not None:
        out = tl.load(out_ptr + first + offsets, mask=inside, other=0.0).to(tl.float32)
        d = out
        if x_ptr is not None:
            d = out - tl.load(x_ptr + first + offsets, mask=inside, other=0.0).to(tl.float32)
        if partials_ptr is not None:
            if RESIDUAL:
                tl.store(partials_ptr + tl.program_id(0), tl.sum(dy * d))
            else:
                tl.store(partials_ptr + tl.program_id(0), tl.sum(dy * out))
        if c1_ptr is not None or c2_ptr is not None:
            p = penalty(d, c1_ptr, c2_ptr, c1_stride, c2_stride, sequence)
            if mask_ptr is not None:
                p = tl.where(load_keep(mask_ptr, sequence, token, tokens, BLOCK_T), p, 0.0)
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
    sizes = tiling(out, token_mask is not None)
    partials = out.new_empty((2, out.shape[0], sizes["tiles"]), dtype=torch.float32) if norms else None
    forward_kernel[(out.shape[0] * sizes["tiles"],)](
        x, out, gate, token_mask, y, partials, stride(gate), RESIDUAL=residual, **sizes, num_warps=WARPS
    )
    return () if partials is None else sum_tiles(partials)


def backward(
    dy: Tensor, x: Tensor | None, out: Tensor | None, gate: Tensor, token_mask: Tensor | None,
    c1: Tensor | None, c2: Tensor | None, dx: Tensor | None, dout: Tensor | None, *, residual: bool, need_dgate: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    """Fills the gradients that are not None; gives the gate's gradient per sequence, fp32 [G], or nothing."""
    sizes = tiling(dy, token_mask is not None)
    partials = dy.new_empty((1, dy.shape[0], sizes["tiles"]), dtype=torch.float32) if need_dgate else None
    backward_kernel[(dy.shape[0] * sizes["tiles"],)](
        dy, x, out, gate, token_mask, c1, c2, dx, dout, partials, stride(gate), stride(c1), stride(c2),
        RESIDUAL=residual, **sizes, num_warps=WARPS,
    )  # fmt: skip
    return () if partials is None else sum_tiles(partials)
