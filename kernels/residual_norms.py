"""Sums of |out - x| and (out - x)^2 per sequence in one pass, and their gradients; the pieces gated_residual shares."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# 4096 elements by 256 threads: two 16-byte loads per thread and bf16 tensor. The tile, not the program or the number of
# multiprocessors, owns a partial sum, so results are the same bits on every GPU and in every run. By
# bench/sweep_kernels.py the fastest on an H200 (bench/results, 65,536 tokens) but for `evict_last`, by 0 to 5%, which
# would keep what is read in the cache and not what the next layer reads. Where no sums are made smaller tiles took 4%
# off the backward pass, 1% off the forward pass and nothing off that of norms only.
TILE = 4096
WARPS = 8
TILE_WITHOUT_SUMS = 2048
WARPS_WITHOUT_SUMS = 4
# Partials that are added at once, and warps: one program adds a sequence, and the more it loads at once, the less often
# it waits. 2048 partials stand for 8 Mi elements, 8192 for 32 Mi.
SECOND_STAGES = ((2048, 8), (8192, 32))
EVICTION = ""  # of the hidden states that are read: "" leaves it to the cache


@triton.jit
def locate_tile(tokens, hidden, tiles, column_tiles, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """This program's sequence, its first token there, its first element, the tile's offsets and which of them exist.

    Only scalars are 64 bits wide: the offsets inside a tile stay 32-bit unless `hidden` itself needs more.
    """
    program = tl.program_id(0)
    sequence = (program // tiles).to(tl.int64)
    tile = program % tiles
    token = (tile // column_tiles).to(tl.int64) * BLOCK_T
    column = (tile % column_tiles).to(tl.int64) * BLOCK_H
    first = (sequence * tokens + token) * hidden + column
    rows = tl.arange(0, BLOCK_T)[:, None]
    columns = tl.arange(0, BLOCK_H)[None, :]
    return sequence, token, first, rows * hidden + columns, (rows < tokens - token) & (columns < hidden - column)


@triton.jit
def load_states(ptr, first, offsets, wanted, EVICTION: tl.constexpr):
    """One tile of hidden states in fp32; 0 where it is not wanted, and nothing is read there."""
    return tl.load(ptr + first + offsets, mask=wanted, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@triton.jit
def load_keep(mask_ptr, sequence, token, tokens, BLOCK_T: tl.constexpr):
    """[BLOCK_T, 1]: the tokens of this tile that the mask keeps."""
    rows = tl.arange(0, BLOCK_T)
    keep = tl.load(mask_ptr + sequence * tokens + token + rows, mask=rows < tokens - token, other=0)
    return (keep != 0)[:, None]


@triton.jit
def store_norms(partials_ptr, d):
    """This tile's two partials; the second half of `partials` belongs to the squares."""
    program = tl.program_id(0)
    tl.store(partials_ptr + program, tl.sum(tl.abs(d)))
    tl.store(partials_ptr + tl.num_programs(0) + program, tl.sum(d * d))


@triton.jit
def penalty(d, c1_ptr, c2_ptr, c1_stride, c2_stride, sequence):
    """c1*sign(d) + 2*c2*d; a missing term is left out, not multiplied by 0: d may be infinite."""
    p = tl.zeros_like(d)
    if c1_ptr is not None:
        c1 = tl.load(c1_ptr + sequence * c1_stride)
        p = tl.where(d > 0, c1, p)
        p = tl.where(d < 0, -c1, p)
    if c2_ptr is not None:
        p += 2.0 * tl.load(c2_ptr + sequence * c2_stride) * d
    return p


@triton.jit
def sum_tiles_kernel(partials_ptr, first_ptr, second_ptr, tiles, BLOCK: tl.constexpr):
    """Second stage: the partials of one sequence, always added in the same order, in fp64."""
    sequence = tl.program_id(0).to(tl.int64)
    row = partials_ptr + sequence * tiles
    pair = tl.num_programs(0).to(tl.int64) * tiles
    lanes = tl.arange(0, BLOCK)
    first = tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    start = 0
    while start < tiles:  # not range(): the interpreter of Triton 3.6 needs a Python int there
        inside = start + lanes < tiles
        first += tl.load(row + start + lanes, mask=inside, other=0.0).to(tl.float64)
        if second_ptr is not None:
            second += tl.load(row + pair + start + lanes, mask=inside, other=0.0).to(tl.float64)
        start += BLOCK
    tl.store(first_ptr + sequence, tl.sum(first).to(tl.float32))
    if second_ptr is not None:
        tl.store(second_ptr + sequence, tl.sum(second).to(tl.float32))


@triton.jit
def forward_kernel(
    x_ptr, out_ptr, mask_ptr, partials_ptr,
    tokens, hidden, tiles, column_tiles,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, EVICTION: tl.constexpr
):  # fmt: skip
    """Reads x and out: 4 bytes per bf16 element, none for tokens that the mask drops."""
    sequence, token, first, offsets, wanted = locate_tile(tokens, hidden, tiles, column_tiles, BLOCK_T, BLOCK_H)
    if mask_ptr is not None:
        wanted = wanted & load_keep(mask_ptr, sequence, token, tokens, BLOCK_T)
    x = load_states(x_ptr, first, offsets, wanted, EVICTION)
    out = load_states(out_ptr, first, offsets, wanted, EVICTION)
    store_norms(partials_ptr, out - x)


@triton.jit(do_not_specialize=["c1_stride", "c2_stride"])
def backward_kernel(
    x_ptr, out_ptr, mask_ptr, c1_ptr, c2_ptr, dx_ptr, dout_ptr, c1_stride, c2_stride,
    tokens, hidden, tiles, column_tiles,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, EVICTION: tl.constexpr
):  # fmt: skip
    """Reads x and out, writes dx and dout: 8 bytes per bf16 element."""
    sequence, token, first, offsets, inside = locate_tile(tokens, hidden, tiles, column_tiles, BLOCK_T, BLOCK_H)
    wanted = inside
    if mask_ptr is not None:
        wanted = inside & load_keep(mask_ptr, sequence, token, tokens, BLOCK_T)
    x = load_states(x_ptr, first, offsets, wanted, EVICTION)
    out = load_states(out_ptr, first, offsets, wanted, EVICTION)
    p = penalty(out - x, c1_ptr, c2_ptr, c1_stride, c2_stride, sequence)
    p = tl.where(wanted, p, 0.0)
    if dx_ptr is not None:
        tl.store(dx_ptr + first + offsets, (-p).to(dx_ptr.dtype.element_ty), mask=inside)
    if dout_ptr is not None:
        tl.store(dout_ptr + first + offsets, p.to(dout_ptr.dtype.element_ty), mask=inside)


def tiling(like: Tensor, masked: bool, *, sums: bool = True) -> dict[str, Any]:
    """How the sequences of `like` are cut into tiles: the size arguments and constants that every kernel takes.

    Without a mask a sequence is one long row, so any hidden size is read by full vectors. With one, a tile is whole
    rows of tokens, as wide as the largest power of two in the hidden size where that fills vectors.
    """
    sequences, hidden = like.shape[0], like.shape[-1]
    length = like.numel() // sequences
    elements, warps = (TILE, WARPS) if sums else (TILE_WITHOUT_SUMS, WARPS_WITHOUT_SUMS)
    if not masked:
        tokens, hidden, height, width = 1, length, 1, elements
    else:
        tokens, divisor = length // hidden, hidden & -hidden
        width = min(divisor, elements) if divisor >= 128 else min(triton.next_power_of_2(hidden), 512)
        height = elements // width
    columns = triton.cdiv(hidden, width)
    return {"tokens": tokens, "hidden": hidden, "tiles": triton.cdiv(tokens, height) * columns,
            "column_tiles": columns, "BLOCK_T": height, "BLOCK_H": width,
            "EVICTION": EVICTION, "num_warps": warps}  # fmt: skip


def sum_tiles(partials: Tensor) -> tuple[Tensor, ...]:
    """[quantities, G, tiles] -> one fp32 [G] per quantity (one or two)."""
    quantities, sequences, tiles = partials.shape
    sums = tuple(partials.new_empty(sequences) for _ in range(quantities))
    block, warps = SECOND_STAGES[tiles > SECOND_STAGES[0][0]]
    sum_tiles_kernel[(sequences,)](
        partials, sums[0], sums[1] if quantities == 2 else None, tiles, BLOCK=block, num_warps=warps
    )
    return sums


def stride(per_sequence: Tensor | None) -> int:
    """Distance between the values of two sequences: 0 where one value serves them all."""
    return per_sequence.stride(0) if per_sequence is not None and per_sequence.dim() else 0


def forward(x: Tensor, out: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """l1 and l2, fp32 [G], of contiguous x and out (G, ..., H); token_mask is contiguous uint8 [tokens] or None."""
    sizes = tiling(x, token_mask is not None)
    partials = x.new_empty((2, x.shape[0], sizes["tiles"]), dtype=torch.float32)
    forward_kernel[(partials[0].numel(),)](x, out, token_mask, partials, **sizes)
    l1, l2 = sum_tiles(partials)
    return l1, l2


def backward(
    x: Tensor, out: Tensor, token_mask: Tensor | None, c1: Tensor | None, c2: Tensor | None,
    dx: Tensor | None, dout: Tensor | None
) -> None:  # fmt: skip
    """Fills the gradients that are not None; c1 and c2 are fp32 [G] of any stride, the gradients of l1 and l2."""
    sizes = tiling(x, token_mask is not None, sums=False)
    backward_kernel[(x.shape[0] * sizes["tiles"],)](
        x, out, token_mask, c1, c2, dx, dout, stride(c1), stride(c2), **sizes
    )
