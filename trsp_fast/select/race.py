"""The best layers of a shortlist by real bypass, where those out of reach go early.

Racing (Maron and Moore, NIPS 1994) with paired differences (F-Race, Birattari et al., GECCO 2002): all candidates are
tried on a few windows, and those that may still be the best on twice as many, and so on. Windows differ from each other
much more than candidates do, but alike for all of them: the difference of two candidates on the same windows is known
long before either loss is.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.engine.distributed import Group
from trsp_fast.engine.objective import INFERENCE_BATCH
from trsp_fast.select.sleb import judge_layers
from trsp_fast.select.stand_in import StandIn

FIRST = 8  # windows at most that all candidates are tried on; those that remain, on twice as many, and so on
REACH = 2.0  # standard errors of the paired difference to the worst of those that would win, beyond which one is out


@dataclass
class Race:
    """Candidates from best to worst by their mean loss: those that ran further first, those that overflowed last.

    losses: float64 by candidate, one per window that it was tried on. close: those within reach to the end, the winners
        among them. cost: in forward passes of one window.
    """

    losses: dict[int, Tensor] = field(default_factory=dict)
    close: list[int] = field(default_factory=list)
    cost: float = 0.0

    @property
    def ranked(self) -> list[int]:
        def place(layer: int) -> tuple[bool, int, float]:
            losses = self.losses[layer]
            return math.isinf(_mean(losses)), -len(losses), _mean(losses)

        return sorted(self.losses, key=place)


@torch.no_grad()
def race(
    model: PreTrainedModel,
    tokens: Tensor,
    layers: list[int],
    wanted: int,
    group: Group,
    stand_ins: Mapping[int, StandIn] | None = None,
) -> Race:
    """Which `wanted` of `layers` hurt least when bypassed alone, each with its stand-in if it has one.

    Args:
        tokens: calibration windows, int64 `[samples, seq]`; the more they are, the closer candidates are told apart.
        group: its processes share the windows of each heat; all get the same result.
    """
    found = Race(close=list(layers))
    for windows in heats(len(tokens)):
        heat = _heat(model, tokens[windows], found.close, group, stand_ins, found)
        for layer, losses in zip(found.close, heat.unbind(1), strict=True):
            found.losses[layer] = torch.cat([found.losses.get(layer, losses[:0]), losses])
        found.close = within_reach({layer: found.losses[layer] for layer in found.close}, wanted)
        if len(found.close) == wanted:
            break
    return found


def heats(count: int) -> Iterator[slice]:
    """Disjoint parts of `count` windows: every so many-th, at most `FIRST`; then as many again between these."""
    step = 1 << max(0, math.ceil(math.log2(count / FIRST)))
    yield slice(0, None, step)
    while step > 1:
        yield slice(step // 2, None, step)
        step //= 2


def within_reach(losses: dict[int, Tensor], wanted: int) -> list[int]:
    """The layers that may still be among the best: those in front, and who is not clearly behind the last of them."""
    ranked = sorted(losses, key=lambda layer: _mean(losses[layer]))
    last = losses[ranked[wanted - 1]]
    if len(last) < 2 or not last.isfinite().all():  # nothing is known of how far windows scatter
        return list(losses)
    out = {layer for layer in ranked[wanted:] if _is_above(losses[layer], last)}
    return [layer for layer in losses if layer not in out]


def _is_above(losses: Tensor, mark: Tensor) -> bool:
    difference = losses - mark
    error = float(difference.std()) / math.sqrt(len(difference))
    return float(difference.mean()) > REACH * error or not losses.isfinite().all()


def _mean(losses: Tensor) -> float:
    mean = float(losses.mean())
    return mean if math.isfinite(mean) else math.inf


def _heat(
    model: PreTrainedModel,
    tokens: Tensor,
    layers: list[int],
    group: Group,
    stand_ins: Mapping[int, StandIn] | None,
    found: Race,
) -> Tensor:
    """Loss by window and layer, float64 `[windows, layers]`, the same in all processes."""
    own, cost = [torch.zeros(0, len(layers), dtype=torch.float64)], torch.zeros((), dtype=torch.float64)
    batch = INFERENCE_BATCH if group.sharded else 0  # all processes must run alike; else a part proves its prefix
    for rows, weight in group.parts(torch.arange(len(tokens)), batch):
        judged = judge_layers(model, tokens[rows], [], layers, stand_ins)
        cost += judged.cost
        if weight:  # else rows of another process, run to keep step
            own.append(torch.stack([judged.by_window[layer] for layer in layers], 1))
    losses = group.spread(torch.cat(own), len(tokens))
    group.sum([losses, cost])
    found.cost += float(cost)
    return losses
