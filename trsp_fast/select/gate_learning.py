"""How stage 1 learns its gates: the steps of a round, what is saved of them, and how an interrupted round goes on."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.config import SelectConfig
from trsp_fast.engine.memory import MemoryPlan, plan_memory, unprobed
from trsp_fast.engine.objective import WindowOrder
from trsp_fast.engine.optimizers import Named, adamw, load_optimizer_state, optimizer_state, step_if
from trsp_fast.engine.precision import Masters
from trsp_fast.engine.readback import Figures, Readback
from trsp_fast.engine.session import Session
from trsp_fast.engine.streak import Streak
from trsp_fast.models.gates import LayerGates
from trsp_fast.models.gathering import own_rows
from trsp_fast.models.offload import streamed_bytes
from trsp_fast.models.prefix import PrefixStates
from trsp_fast.run.state import State, fitting
from trsp_fast.select.stand_in import StandIns

DAMPING = 1e-4  # added to F in the natural step, so that a gate without any gradient moves by lambda1 alone


@dataclass
class Learning:
    """What one call of `select` carries from step to step. `done` are the finished steps of the round `index`."""

    model: PreTrainedModel
    config: SelectConfig
    session: Session
    gates: LayerGates
    alive: list[int]
    tokens: Tensor
    count: int
    order: WindowOrder
    steps: int
    masters: Masters
    weights: Named
    prefix: PrefixStates | None = None
    loss: Callable[[Tensor], Tensor] = field(init=False)
    index: int = 0
    done: int = 0
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    curvature: Tensor = field(default_factory=lambda: torch.zeros(0))
    counted: Tensor = field(default_factory=lambda: torch.zeros(0))  # steps of the round that F is a mean of
    readback: Readback = field(default_factory=Readback)
    streak: Streak = field(default_factory=lambda: Streak("1", "select.lr"))
    chosen: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    cost: int = 0
    stand_ins: StandIns | None = None  # where candidates are judged by their fold


def plan_of(learning: Learning, batch: int) -> MemoryPlan:
    if learning.session.group.sharded:
        return unprobed(learning.model)
    trained = sum(parameter.numel() for parameter in learning.weights.values())
    streamed = streamed_bytes(learning.model)

    def step(windows: int) -> None:
        _pass(learning, torch.arange(windows))
        learning.gates.values.grad = None

    return plan_memory(
        learning.model,
        step,
        min(batch, len(learning.tokens)),
        learning.tokens.shape[1],
        gated=learning.alive,
        held={"fp32 copies": learning.masters.growth},
        coming={"optimiser": 8 * trained, **({"streamed layers": streamed} if streamed else {})},
        gradients=4 * trained,
    )


def begin_or_resume(learning: Learning) -> None:
    """Gates at 1 and new optimisers, or everything as the saved state has it."""
    learning.gates.values.data.fill_(1.0)
    _begin_round(learning)
    state = learning.session.keeper.found("select")
    if state is None:
        return
    values, tensors = state.values, state.tensors
    learning.index, learning.done, learning.cost = values["index"], values["done"], values["cost"]
    learning.history, learning.rounds = values["history"], values["rounds"]
    learning.streak.count, learning.session.micro_batch = values["streak"], values["micro_batch"]
    learning.gates.bypass(values["chosen"])
    learning.chosen = values["chosen"]
    learning.alive = [layer for layer in learning.alive if layer not in learning.chosen]
    with torch.no_grad():
        for name, tensor in _tensors(learning).items():
            if "optimizer" not in name:
                tensor.copy_(fitting(tensors, name, tensor))
    for kind, optimizer in learning.optimizers.items():
        prefix = f"optimizer.{kind}."
        saved = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        load_optimizer_state(optimizer, _named(learning, kind), saved)
    looking = len(learning.chosen) == learning.count
    learning.session.events.emit("resumed", stage="select", round=learning.index, step=learning.done, looking=looking)


def state_of(learning: Learning) -> State:
    learning.readback.flush()
    values = {
        "index": learning.index,
        "done": learning.done,
        "chosen": learning.chosen,
        "cost": learning.cost,
        "history": learning.history,
        "rounds": learning.rounds,
        "streak": learning.streak.count,
        "micro_batch": learning.session.micro_batch,
    }
    return State("select", learning.index * learning.steps + learning.done, values, _tensors(learning))


def state_bytes(learning: Learning) -> int:
    """Of the trained weights and their two moments; nothing else is large."""
    return sum(3 * own_rows(parameter).nbytes for parameter in learning.weights.values())


def _tensors(learning: Learning) -> dict[str, Tensor]:
    tensors = {"gates": learning.gates.values, "curvature": learning.curvature, "counted": learning.counted}
    tensors |= {f"weight.{name}": parameter for name, parameter in learning.weights.items()}
    for kind, optimizer in learning.optimizers.items():
        found = optimizer_state(optimizer, _named(learning, kind))
        tensors |= {f"optimizer.{kind}.{name}": tensor for name, tensor in found.items()}
    return tensors


def _named(learning: Learning, kind: str) -> Named:
    return {"gates": learning.gates.values} if kind == "gates" else learning.weights


def _begin_round(learning: Learning) -> None:
    """F starts at nothing; gates and optimisers start afresh with `reset_gates` or in the first round."""
    gates = learning.gates
    learning.curvature = torch.zeros_like(gates.values)
    learning.counted = torch.zeros_like(gates.values[0])
    if learning.index == 0 or learning.config.reset_gates:
        gates.values.data.fill_(1.0)
        learning.optimizers = _optimizers(learning)


def learn_round(learning: Learning) -> None:
    """The steps of one round that are still to do."""
    if learning.done == 0:
        _begin_round(learning)
    _keep_prefix(learning)
    while learning.done < learning.steps:
        _learn_step(learning)
        learning.done += 1
        if learning.done < learning.steps:  # after the last one the choice is next, then the round is saved
            learning.session.keeper.after_step(lambda: state_of(learning), size=state_bytes(learning))
    learning.readback.flush()


def _keep_prefix(learning: Learning) -> None:
    """What lies below the lowest gate is the same in every step; it changes only when that gate's layer goes."""
    first = learning.alive[0]
    if learning.prefix is None or learning.prefix.first != first:
        learning.prefix = None  # let go of the old states before new ones are made
        if not learning.weights and learning.steps > 1:
            learning.prefix = PrefixStates.build(learning.model, learning.tokens, first, learning.session.events)


def _learn_step(learning: Learning) -> None:
    gates, session, number = learning.gates, learning.session, learning.index * learning.steps + learning.done
    rows = learning.order.rows(number)
    sums: Figures = {}
    sequences: list[Tensor] = []

    def begin() -> None:
        gates.values.grad = torch.zeros_like(gates.values)
        for parameter in learning.weights.values():
            parameter.grad = None
        sums.update(loss=torch.zeros_like(gates.values[0]), D=torch.zeros_like(gates.values))
        sequences[:] = [gates.values.new_zeros(0, len(gates.values))]  # a process may have no rows of a small batch

    def work(part: Tensor, weight: float) -> None:
        loss, own = _pass(learning, part, weight)
        if weight:  # else rows of another process, run to keep step
            sequences.append(
                own * len(rows)
            )  # the loss is a mean over the batch: times its size is each sequence's own
        sums["loss"] += loss.detach() * weight
        for layer, d in gates.distances("l2").items():
            sums["D"][layer] += d.detach() * weight

    session.accumulate(rows, work, begin)
    gradient = gates.values.grad
    assert gradient is not None
    own = session.group.spread(torch.cat(sequences), len(rows))
    session.group.sum_with_gradients([sums["loss"], sums["D"], gradient, own], learning.weights.values())
    finite = torch.isfinite(sums["loss"]) & torch.isfinite(gradient).all()
    learning.counted += finite
    change = (own.square().mean(0) - learning.curvature) / learning.counted.clamp(min=1)
    learning.curvature += torch.where(finite, change, 0.0)
    learning.cost += 3 * len(rows)
    figures = {**sums, "gates": gates.values, "gradient": gradient, "sequences": own, "finite": finite}
    where, alive = (learning.index, learning.done), list(learning.alive)
    learning.readback.put(figures, lambda host: _note(learning, where, alive, rows, host))
    _move_gates(learning, finite)


def _pass(learning: Learning, rows: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Forward and backward of some windows: their loss, and the gradient by sequence and gate of loss * weight."""
    known = learning.prefix.rows(rows) if learning.prefix else nullcontext()
    with learning.masters.autocast, known:
        loss = learning.loss(learning.tokens[rows].to(learning.gates.values.device))
    (loss * weight).backward()
    own = learning.gates.gradients()
    assert own is not None
    return loss, own


def _move_gates(learning: Learning, finite: Tensor) -> None:
    """One step on loss + lambda1 * sum |S|; only gates of alive layers move, and none where the step is not finite."""
    gates, settings = learning.gates, learning.config
    alive = torch.zeros_like(gates.values, dtype=torch.bool)
    alive[learning.alive] = True
    assert gates.values.grad is not None
    with torch.no_grad():
        gradient = torch.where(alive, gates.values.grad + settings.lambda1 * gates.values.sign(), 0.0)
        if settings.optimizer == "natural":
            gradient = gradient / (learning.curvature + DAMPING)
        gates.values.grad = gradient
    before = gates.values.detach().clone()
    for optimizer in learning.optimizers.values():
        step_if(optimizer, finite)
    # Adam's momentum would go on moving the gates of removed layers
    gates.values.data.copy_(torch.where(alive, gates.values, before))


def _optimizers(learning: Learning) -> dict[str, torch.optim.Optimizer]:
    """One for the gates (the natural step is plain descent on the divided gradient), AdamW for trained weights."""
    settings, values = learning.config, [learning.gates.values]
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
    optimizers: dict[str, torch.optim.Optimizer] = {"gates": kind(values, lr=settings.lr, fused=True)}
    if settings.train_weights:
        optimizers["weights"] = adamw(learning.weights.values(), settings.weights_lr, (0.9, 0.999))
    return optimizers


def _note(learning: Learning, where: tuple[int, int], alive: list[int], rows: Tensor, host: Figures) -> None:
    """One step's entry of the history, as plain values, once they have arrived."""
    values, lm_loss = host["gates"], float(host["loss"])
    entry = {
        "round": where[0],
        "step": where[1],
        "steps": learning.steps,
        "loss": lm_loss + learning.config.lambda1 * float(values[alive].abs().sum()),
        "lm_loss": lm_loss,
        "gates": by_layer(alive, values.tolist()),
        "gradients": by_layer(alive, host["gradient"].tolist()),
        "sequence_gradients": [by_layer(alive, row) for row in host["sequences"].tolist()],
        "D": by_layer(alive, host["D"].tolist()),
    }
    learning.history.append(entry)
    learning.session.events.emit("select_step", **entry)
    learning.streak.take(bool(host["finite"]), f"loss is {lm_loss}", f"round {where[0]}, step {where[1]}", rows)


def by_layer(alive: list[int], values: list[Any]) -> list[Any]:
    """The values of alive layers, None for bypassed and protected ones."""
    return [value if layer in alive else None for layer, value in enumerate(values)]
