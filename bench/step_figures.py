"""The arithmetic of bench_step.py: steps counted and run, extrapolation, agreement, FLOPs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

STAGES = ("select", "transfer")
# First losses of equal weights: in fp32 only the order of sums differs. In bf16 the plain port has fp32 weights and
# residual stream under autocast, frozen weights are bf16 throughout.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Plan:
    """How much a run of the recipe is, and how much of it is measured.

    samples: windows. batches: windows a step, by stage. rounds: layers that stage 1 chooses, one a round.
    measured: most steps of a round, and of stage 2, that are run; the others are counted.
    """

    samples: int
    batches: dict[str, int]
    rounds: int
    measured: dict[str, int]
    seed: int = 0

    def counted_steps(self, stage: str) -> list[int]:
        """Optimiser steps of the whole recipe, by round (stage 2 is one round): one pass over the windows each."""
        steps = -(-self.samples // self.batches[stage])
        return [steps] * (self.rounds if stage == "select" else 1)

    def measured_steps(self, stage: str) -> list[int]:
        return [min(steps, self.measured[stage]) for steps in self.counted_steps(stage)]


@dataclass
class Run:
    """One call of one stage: the loss and the seconds (wall, processor) of every step.

    seconds: of the whole call. peak_bytes: what a GPU's allocator held above the weights at most, None on a CPU.
    hand_over: called between steps, where others have their turn; its time is not counted.
    """

    hand_over: Callable[[], None] | None = None
    losses: list[float] = field(default_factory=list)
    durations: list[tuple[float, float]] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int | None = None
    _since: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self._since = (time.perf_counter(), time.process_time())

    def step_done(self, loss: float) -> None:
        self.losses.append(loss)
        wall, processor = self._since
        self.durations.append((time.perf_counter() - wall, time.process_time() - processor))
        if self.hand_over:
            self.hand_over()
        self.start()

    def finish(self) -> None:
        after_the_last_step = time.perf_counter() - self._since[0]
        self.seconds = sum(wall for wall, _ in self.durations) + after_the_last_step


def train_seconds(run: Run, plan: Plan, stage: str, clock: int = 0) -> float:
    """What all counted steps take: their number in each round times the median of that round's measured ones.

    The first step of the run is not among them (it contains the preparation) where its round has others.
    """
    total, steps = 0.0, [duration[clock] for duration in run.durations]
    for index, (measured, counted) in enumerate(
        zip(plan.measured_steps(stage), plan.counted_steps(stage), strict=True)
    ):
        mine, steps = steps[:measured], steps[measured:]
        total += counted * statistics.median(mine[1:] if index == 0 and len(mine) > 1 else mine)
    assert not steps
    return total


def stage_seconds(run: Run, plan: Plan, stage: str) -> float:
    """The call's own seconds, plus what the steps that were not run would take."""
    per_step = train_seconds(run, plan, stage) / sum(plan.counted_steps(stage))
    return run.seconds + (sum(plan.counted_steps(stage)) - sum(plan.measured_steps(stage))) * per_step


def agree(losses: list[float], dtype: torch.dtype) -> bool:
    """Whether the arms' first losses, of equal weights on equal tokens, are the same within rounding."""
    middle = statistics.median(losses)
    return all(abs(loss - middle) <= AGREEMENT[dtype] * abs(middle) for loss in losses)  # NaN agrees with nothing


def speedup(plain: list[float], ours: list[float], agreed: bool) -> float | None:
    """Median over the pairs of how many times the time of ours the plain port takes; None without agreement."""
    return statistics.median(a / b for a, b in zip(plain, ours, strict=True)) if agreed else None


@dataclass(frozen=True)
class Matmuls:
    """Elements of the weight matrices of one decoder layer and of the head, and the width of attention."""

    layer: int
    head: int
    width: int
    layers: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Matmuls":
        config, layers = model.config, model.model.layers
        linear = [module.weight.numel() for module in layers[0].modules() if isinstance(module, nn.Linear)]
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(sum(linear), model.lm_head.weight.numel(), config.num_attention_heads * head_dim, len(layers))


def step_flops(sizes: Matmuls, windows: int, seq: int, layers: int, *, weights: bool) -> float:
    """FLOPs that one step needs, recomputation not counted.

    Forward: 2 per weight element and token, and 2 * 2 * width per pair of tokens that attention's causal half has.
    Backward: a matmul's input gradient costs as much as its forward pass and its weight gradient again as much;
    attention has two inputs and so always costs twice. Without weight gradients the lowest layer has no backward
    pass: its gate's gradient needs its output's only.
    """
    tokens = windows * seq
    layer, head = 2.0 * sizes.layer * tokens, 2.0 * sizes.head * tokens
    attention = 2 * 2.0 * sizes.width * tokens * (seq + 1) / 2
    forward = layers * (layer + attention) + head
    return forward + (2 * forward if weights else head + (layers - 1) * (layer + 2 * attention))


def stage_flops(sizes: Matmuls, plan: Plan, stage: str, seq: int, *, weights: bool) -> float:
    """FLOPs of all counted steps of a stage: round r of stage 1 runs r layers less."""
    return sum(
        steps * step_flops(sizes, plan.batches[stage], seq, sizes.layers - index, weights=weights)
        for index, steps in enumerate(plan.counted_steps(stage))
    )
