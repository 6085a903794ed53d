"""Tensors of a checkpoint larger than memory: read one at a time, or two side by side in chunks."""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trsp_fast.errors import UserError
from trsp_fast.models.checkpoint_files import folder_of, weight_files

CHUNK = 1 << 22  # elements, 16 MB in fp32: long reads, and small beside a layer

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. It is read, not mapped: pages of a mapped file would count as this process's memory."""

    descriptor: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def read(self, begin: int, end: int) -> Tensor:
        """Elements `begin` to `end` of the flattened tensor."""
        size = self.dtype.itemsize
        raw = torch.empty((end - begin) * size, dtype=torch.uint8)
        left, position = memoryview(raw.numpy().data), self.offset + begin * size
        while left:
            done = os.preadv(self.descriptor, [left], position)
            if not done:
                raise UserError("a weight file became shorter while it was read; leave the checkpoint as it is.")
            left, position = left[done:], position + done
        return raw.view(self.dtype)

    def __getitem__(self, _everything: object) -> Tensor:
        """The whole tensor; transformers asks a tensor of a file for `[...]` when it wants it."""
        return self.read(0, self.elements).view(self.shape)

    def meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Pieces:
    """A tensor that holds one piece per layer along `dimension`: which of `count` pieces the shorter one has."""

    dimension: int
    kept: list[int]
    count: int


@dataclass(frozen=True)
class SpreadTensor(StoredTensor):
    """A tensor of pieces of the layers that stay, as the tensor of all layers with 0 for the others."""

    pieces: Pieces

    def __getitem__(self, _everything: object) -> Tensor:
        dimension, kept = self.pieces.dimension, self.pieces.kept
        short = super().__getitem__(...).unflatten(dimension, (len(kept), -1))
        whole = short.new_zeros(*short.shape[:dimension], self.pieces.count, *short.shape[dimension + 1 :])
        return whole.index_copy_(dimension, torch.tensor(kept), short).flatten(dimension, dimension + 1)

    def meta(self) -> Tensor:
        shape = list(self.shape)
        shape[self.pieces.dimension] = shape[self.pieces.dimension] // len(self.pieces.kept) * self.pieces.count
        return torch.empty(shape, dtype=self.dtype, device="meta")


@contextlib.contextmanager
def open_tensors(folder: str | Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of a checkpoint's safetensors files by name; the files are open inside the block.

    Raises:
        UserError: the files are missing, broken or hostile, or hold a dtype that models are not computed in.
    """
    with weight_files(folder_of(folder)) as files:
        tensors = {}
        for file in files:
            for name, dtype, shape, begin, _ in file.tensors:
                if dtype not in _DTYPES:
                    raise UserError(
                        f"tensor {name!r} has dtype {dtype}, which cannot be computed with; give unquantised weights."
                    )
                start = 8 + len(file.header) + begin
                tensors[name] = StoredTensor(file.descriptor, start, _DTYPES[dtype], tuple(shape))
        yield tensors


def side_by_side(long: StoredTensor, short: StoredTensor, pieces: Pieces | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of two tensors, flat and of equal length: all of both, or of `long` only the pieces that `short` has."""
    rows, count, kept, inner = long.elements, 1, [0], 1
    if pieces is not None:
        count, kept = pieces.count, pieces.kept
        rows = math.prod(long.shape[: pieces.dimension])
        inner = long.elements // max(1, rows * count)
    step = max(1, CHUNK // (count * inner))
    for begin in range(0, rows, step):
        end = min(rows, begin + step)
        chunk = long.read(begin * count * inner, end * count * inner)
        if pieces is not None:
            chunk = chunk.view(end - begin, count, inner)[:, kept].flatten()
        yield chunk, short.read(begin * len(kept) * inner, end * len(kept) * inner)
