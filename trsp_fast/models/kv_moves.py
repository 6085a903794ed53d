"""Slots of a KV slab and the ops that move them: C++ on the CPU, a CUDA kernel where it was built, else copies."""

from typing import NamedTuple

import torch
from torch import Tensor

from trsp_fast.ops.backends import LIBRARY


class SlotShape(NamedTuple):
    """Sizes of one layer's slot, in elements; `length` is in tokens."""

    batch: int
    heads: int
    length: int
    key_width: int
    value_width: int

    @property
    def elements(self) -> int:
        return self.batch * self.heads * self.length * (self.key_width + self.value_width)


LIBRARY.define("kv_compact_(Tensor(a!) slab, int[] slots, int[] sizes, int[] filled) -> ()")
LIBRARY.define(
    "kv_regrid_(Tensor(a!) slab, Tensor(b!) scratch, int count, int[] before, int[] after, int[] filled) -> ()"
)


def slot_views(slab: Tensor, index: int, shape: SlotShape) -> tuple[Tensor, Tensor]:
    """K and V of a slot, views (batch, heads, length, width) of the slab."""
    begin, rows = index * shape.elements, shape.batch * shape.heads
    sizes = [rows * shape.length * width for width in (shape.key_width, shape.value_width)]
    keys, values = slab.narrow(0, begin, sizes[0]), slab.narrow(0, begin + sizes[0], sizes[1])
    return (
        keys.view(shape.batch, shape.heads, shape.length, shape.key_width),
        values.view(shape.batch, shape.heads, shape.length, shape.value_width),
    )


def _copy_filled(to: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor], filled: list[int]) -> None:
    batch, length = filled
    for target, origin in zip(to, source, strict=True):
        target[:batch, :, :length].copy_(origin[:batch, :, :length])


def _compact(slab: Tensor, slots: list[int], sizes: list[int], filled: list[int]) -> None:
    shape = SlotShape(*sizes)
    for index, slot in enumerate(slots):
        if slot != index:
            _copy_filled(slot_views(slab, index, shape), slot_views(slab, slot, shape), filled)


def _regrid(slab: Tensor, scratch: Tensor, count: int, before: list[int], after: list[int], filled: list[int]) -> None:
    old, new = SlotShape(*before), SlotShape(*after)
    tight = slot_views(scratch, 0, old._replace(batch=filled[0], length=filled[1]))
    # Growing slots last first, shrinking ones first first: none is overwritten before it is read.
    order = range(count) if new.elements < old.elements else reversed(range(count))
    for index in order:
        _copy_filled(tight, slot_views(slab, index, old), filled)
        _copy_filled(slot_views(slab, index, new), tight, filled)


LIBRARY.impl("kv_compact_", _compact, "CompositeExplicitAutograd")
LIBRARY.impl("kv_regrid_", _regrid, "CompositeExplicitAutograd")
torch.library.register_fake("trsp_fast::kv_compact_", lambda *_: None, lib=LIBRARY)
torch.library.register_fake("trsp_fast::kv_regrid_", lambda *_: None, lib=LIBRARY)
