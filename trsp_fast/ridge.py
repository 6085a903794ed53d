"""Ridge regression from sums over tokens, in fp64: the change of a projection that supplies what is lacking behind it.

Windows that the sums for fitting are not of judge how strongly it is damped.
"""

import copy

import torch
from torch import Tensor

from trsp_fast.engine.distributed import Group

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the mean square of the projection's inputs
VALIDATION = 4  # one window in so many judges the ridge
ENOUGH = 0.9  # of what the best ridge gains: the largest that gains so much is taken, since training goes on from there
MIXTURES = 256  # of a layer's outputs that ridges are compared by; with 32 real models take the same ridges (NOTES.md)


class Sums:
    """Over tokens a = sum h h^T `[n, n]`, b = sum h d^T `[n, hidden]` and c = sum |d|^2, fp64; d is what is lacking."""

    def __init__(self, inputs: int, outputs: int, place: torch.device) -> None:
        self.a = torch.zeros(inputs, inputs, dtype=torch.float64, device=place)
        self.b = torch.zeros(inputs, outputs, dtype=torch.float64, device=place)
        self.c = torch.zeros((), dtype=torch.float64, device=place)

    def add(self, h: Tensor, d: Tensor, share: float) -> None:
        """Args: h: `[tokens, n]`, to be taken times `share`, in the dtype of the pass. d: `[tokens, hidden]`, fp32."""
        a, b = products(h, d)
        self.a.add_(a.to(self.a.device), alpha=share**2)
        self.b.add_(b.to(self.b.device), alpha=share)
        self.c += d.double().pow(2).sum().to(self.c.device)

    def mixed(self) -> "Sums":
        """With `MIXTURES` mixtures of the outputs in their place, where they are more, to compare ridges by.

        To solve for all outputs is most of the time of a fold. With signs drawn at random what every ridge gains grows
        by the same factor, on average.
        """
        outputs, few = self.b.shape[1], copy.copy(self)
        if outputs > MIXTURES:
            signs = torch.randint(0, 2, (outputs, MIXTURES), generator=torch.Generator().manual_seed(0)) * 2 - 1
            few.b = self.b @ signs.to(self.b)
        return few

    def solved(self, ridge: float) -> Tensor | None:
        """The W `[n, hidden]` of least sum |d - h W|^2 + ridge * mean h^2 * |W|^2."""
        damped = self.a.clone()
        damped.diagonal().add_(ridge * self.a.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        return None if failed else torch.cholesky_solve(self.b, factor)

    def gained(self, change: Tensor) -> float:
        """sum |d|^2 - sum |d - h W|^2."""
        return float(2 * (change * self.b).sum() - (change * (self.a @ change)).sum())


def products(h: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """h^T h and h^T d in fp32, of h `[tokens, n]` in any dtype and d `[tokens, hidden]` in fp32.

    A GPU multiplies bf16 numbers more than ten times as fast as fp32 ones, exactly, and adds up in fp32. So h in bf16
    stays as it is there, and d becomes the sum of two bf16 numbers: 16 of its 24 bits.
    """
    if h.dtype == torch.bfloat16 and h.is_cuda:
        high = d.bfloat16()
        low = (d - high).bfloat16()
        of_h, of_high, of_low = (torch.mm(h.T, factor, out_dtype=torch.float32) for factor in (h, high, low))
        return of_h, of_high + of_low
    h = h.float()
    return h.T @ h, h.T @ d


def with_ones(h: Tensor) -> Tensor:
    """`h` `[..., n]` with one more input that is always 1: a bias is its weight."""
    return torch.cat([h, h.new_ones((*h.shape[:-1], 1))], dim=-1)


def best_change(fitting: Sums, judging: Sums, device: torch.device, group: Group) -> Tensor | None:
    """W `[n, hidden]` in fp32, by the ridge that the judging windows ask for; None where none serves them.

    The first process solves: another's factorisation may round otherwise. `fitting` becomes the sums of both.
    """
    change = torch.zeros_like(fitting.b, dtype=torch.float32)
    if group.rank == 0:
        few, judges = fitting.mixed(), judging.mixed()
        gains = {ridge: judges.gained(w) for ridge in RIDGES if (w := few.solved(ridge)) is not None}
        most = max(gains.values(), default=0.0)
        if most > 0:
            fitting.a += judging.a
            fitting.b += judging.b
            solution = fitting.solved(max(r for r, gain in gains.items() if gain >= ENOUGH * most))
            if solution is not None:
                change.copy_(solution)
    change = change.to(device)
    group.sum([change])
    return change if bool(change.any()) else None
