"""Stage 1 of TRSP (arXiv 2505.18232, section 3.2): learn one gate per layer under an l1 penalty, remove the smallest.

Beside the published step (Adam on the gates) there is a natural one. A trained model is nearly stationary under
rescaling a layer, so the mean gradient of a gate is noise and Adam, which divides by its size, ranks that noise. The
spread of the gradient over sequences is not noise: its second moment F is the curvature of the loss in the gate. The
`natural` optimiser divides by F, `rank = fisher` orders by it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.config import SelectConfig, TRSPConfig
from trsp_fast.engine.objective import epochs_of_batches, language_model_loss, mean_loss
from trsp_fast.engine.precision import fp32_weights
from trsp_fast.errors import CheckFailed
from trsp_fast.models.gates import LayerGates
from trsp_fast.run.events import Events
from trsp_fast.select.contract import Selection, candidates
from trsp_fast.select.sleb import losses_without

BATCH = 16  # windows a step by default: the second moment needs several sequences at once
JUDGE_WINDOWS = 32  # calibration windows on which a shortlist is judged
DAMPING = 1e-4  # added to F in the natural step, so that a gate without any gradient moves by lambda1 alone


@dataclass
class _Learning:
    """What one call of `select` carries from step to step."""

    model: PreTrainedModel
    config: SelectConfig
    gates: LayerGates
    alive: list[int]
    batches: Iterator[Tensor]
    steps: int
    events: Events
    autocast: AbstractContextManager
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    curvature: Tensor = field(default_factory=lambda: torch.zeros(0))
    history: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    cost: int = 0


def select(model: PreTrainedModel, tokens: Tensor, count: int, config: TRSPConfig, events: Events) -> Selection:
    """Learn the gates round by round; each round removes one layer (`oneshot`: one round removes them all).

    Args:
        model: weights stay frozen and untouched unless `select.train_weights`.
        tokens: calibration windows, int64 `[samples, seq]`.
        count: how many layers to choose.

    Returns:
        The layers in order of choice. The history has one entry per step: round, step, loss, lm_loss, and by layer
        gates, gradients (mean and per sequence), D; bypassed and protected layers are null there.

    Raises:
        CheckFailed: the loss is not finite.
    """
    settings, batch = config.select, config.data.batch or BATCH
    allowed = _unprotected(model, config, count, events)
    generator = torch.Generator().manual_seed(config.seed)
    steps = settings.steps_per_round or -(-len(tokens) // batch)
    chosen: list[int] = []
    model.eval()  # no dropout: the gates measure the layers as they are used
    with (
        _trainable(model, settings.train_weights) as autocast,
        LayerGates(model, mode=settings.gate_mode, layers=allowed) as gates,
    ):
        batches = epochs_of_batches(tokens, batch, generator)
        learning = _Learning(model, settings, gates, allowed, batches, steps, events, autocast)
        rounds = 1 if settings.schedule == "oneshot" else count
        for index in range(rounds):
            _learn_round(learning, index)
            wanted = count if settings.schedule == "oneshot" else 1
            for layer in _lowest(learning, tokens, chosen, wanted, index):
                chosen.append(layer)
                learning.alive = [other for other in learning.alive if other != layer]
                gates.bypass([layer])
        if settings.train_weights:
            _discard_gates(learning, tokens[:JUDGE_WINDOWS])
    return Selection(chosen, learning.history, learning.cost, learning.rounds)


def _learn_round(learning: _Learning, index: int) -> None:
    """The steps of one round; gates and optimiser start afresh with `reset_gates` or in the first round."""
    gates = learning.gates
    if index == 0 or learning.config.reset_gates:
        gates.values.data.fill_(1.0)
        learning.optimizers = _optimizers(learning)
    learning.curvature = torch.zeros_like(gates.values)
    for step in range(learning.steps):
        tokens = next(learning.batches).to(gates.values.device)
        with learning.autocast:
            lm_loss = language_model_loss(learning.model, tokens)
        alive = torch.tensor(learning.alive, device=gates.values.device)
        penalty = learning.config.lambda1 * gates.values[alive].abs().sum()
        gates.values.grad = None
        if not torch.isfinite(lm_loss):
            raise CheckFailed(
                f"the loss is {float(lm_loss)} in round {index}, step {step} of stage 1; "
                "check the weights and the data, or lower select.lr."
            )
        lm_loss.backward()
        learning.cost += 3 * len(tokens)
        entry = _record(learning, index, step, float(lm_loss.detach()), float(penalty.detach()))
        rows = gates.gradients()
        assert rows is not None
        # The loss is a mean over sequences: a row times their number is that sequence's own gradient.
        second_moment = (rows * len(rows)).square().mean(0)
        learning.curvature += (second_moment - learning.curvature) / (step + 1)
        _move_gates(learning)
        learning.events.emit("select_step", **entry)
        learning.history.append(entry)


def _move_gates(learning: _Learning) -> None:
    """One step on loss + lambda1 * sum |S|; only gates of alive layers move."""
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
    for optimizer in learning.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    # Adam's momentum would go on moving the gates of removed layers
    gates.values.data.copy_(torch.where(alive, gates.values, before))


def _optimizers(learning: _Learning) -> list[torch.optim.Optimizer]:
    """One for the gates (the natural step is plain descent on the divided gradient), AdamW for trained weights."""
    settings, values = learning.config, [learning.gates.values]
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
    optimizers: list[torch.optim.Optimizer] = [kind(values, lr=settings.lr)]
    if settings.train_weights:
        weights = learning.model.parameters()
        optimizers.append(torch.optim.AdamW(weights, lr=settings.weights_lr, weight_decay=0.0))
    return optimizers


def _record(learning: _Learning, index: int, step: int, lm_loss: float, penalty: float) -> dict[str, Any]:
    """One step's entry of the history, as plain values."""
    gates, rows = learning.gates, learning.gates.gradients()
    assert rows is not None
    assert gates.values.grad is not None
    distances = {layer: float(d.detach()) for layer, d in gates.distances("l2").items()}
    return {
        "round": index,
        "step": step,
        "steps": learning.steps,
        "loss": lm_loss + penalty,
        "lm_loss": lm_loss,
        "gates": _by_layer(learning, gates.values.tolist()),
        "gradients": _by_layer(learning, gates.values.grad.tolist()),
        "sequence_gradients": [_by_layer(learning, row) for row in (rows * len(rows)).tolist()],
        "D": _by_layer(learning, [distances.get(layer) for layer in range(len(gates.stack))]),
    }


def _by_layer(learning: _Learning, values: list[Any]) -> list[Any]:
    """The values of alive layers, None for bypassed and protected ones."""
    alive = set(learning.alive)
    return [value if layer in alive else None for layer, value in enumerate(values)]


def _lowest(learning: _Learning, tokens: Tensor, chosen: list[int], wanted: int, index: int) -> list[int]:
    """The `wanted` lowest layers by the configured rank, or by real bypass among a shortlist of them."""
    gates, settings = learning.gates, learning.config
    score = learning.curvature if settings.rank == "fisher" else gates.values.detach().abs()
    ranked = sorted(learning.alive, key=lambda layer: float(score[layer]))
    judged: dict[int, float] = {}
    if settings.shortlist > 1:
        short = ranked[: max(settings.shortlist, wanted)]
        judge = tokens[:JUDGE_WINDOWS]
        with gates.neutral():
            judged = losses_without(learning.model, judge, [], short)
        learning.cost += len(judge) * len(short)
        ranked = sorted(short, key=lambda layer: judged[layer])
    for layer in ranked[:wanted]:
        entry = {
            "round": index,
            "layer": layer,
            "gate": float(gates.values[layer].detach()),
            "curvature": float(learning.curvature[layer]),
            "judged": judged,
            "gates": _by_layer(learning, gates.values.tolist()),
            "curvatures": _by_layer(learning, learning.curvature.tolist()),
        }
        learning.rounds.append(entry)
        learning.events.emit("round", **entry)
    return ranked[:wanted]


def _discard_gates(learning: _Learning, tokens: Tensor) -> None:
    """Stage 2 goes on with the trained weights but without the gates that they were trained with: log the jump."""
    gates = learning.gates
    gates.restore(gates.bypassed)
    with_gates = mean_loss(learning.model, tokens)
    with gates.neutral():
        without_gates = mean_loss(learning.model, tokens)
    learning.events.emit("gates_discarded", loss_with_gates=with_gates, loss_without_gates=without_gates)


def _unprotected(model: PreTrainedModel, config: TRSPConfig, count: int, events: Events) -> list[int]:
    """The layers that carry a gate. In output mode the last one must not: the final norm removes its scale."""
    allowed = candidates(model, config)
    last = candidates(model, config, protect=False)[-1]
    if config.select.gate_mode == "output" and last in allowed and len(allowed) > count:
        allowed.remove(last)
        events.note(
            f"layer {last} carries no gate: in output mode the final norm removes its scale, so that the l1 penalty "
            "alone would choose it; select.protect_last=1 says the same."
        )
    return allowed


@contextmanager
def _trainable(model: PreTrainedModel, train: bool) -> Iterator[AbstractContextManager]:
    """All weights frozen, or all trained as fp32 copies; yields the autocast of the forward pass. Flags come back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(train)
    try:
        with fp32_weights(model) if train else nullcontext(nullcontext()) as autocast:
            yield autocast
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
