"""Stage 1 of TRSP (arXiv 2505.18232, section 3.2): learn one gate per layer under an l1 penalty, remove the smallest.

Beside the published step (Adam on the gates) there is a natural one. A trained model is nearly stationary under
rescaling a layer, so the mean gradient of a gate is noise and Adam, which divides by its size, ranks that noise. The
spread of the gradient over sequences is not noise: its second moment F is the curvature of the loss in the gate. The
`natural` optimiser divides by F, `rank = fisher` orders by it.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.objective import WindowOrder, mean_loss
from trsp_fast.engine.precision import Masters, fp32_weights
from trsp_fast.engine.session import Session
from trsp_fast.models.compiled import compiled_layers
from trsp_fast.models.gates import LayerGates
from trsp_fast.models.recompute import recomputed
from trsp_fast.select.contract import Selection, candidates
from trsp_fast.select.exchange import exchange
from trsp_fast.select.gate_learning import (
    Learning,
    begin_or_resume,
    by_layer,
    learn_round,
    plan_of,
    state_bytes,
    state_of,
)
from trsp_fast.select.race import Race
from trsp_fast.select.shortlist import bypass_with_stand_ins, make_stand_ins, raced, told
from trsp_fast.select.stand_in import StandIn

BATCH = 16  # windows a step by default: the second moment needs several sequences at once
JUMP_WINDOWS = 32  # calibration windows on which the loss with and without trained gates is told


def select(model: PreTrainedModel, tokens: Tensor, count: int, config: TRSPConfig, session: Session) -> Selection:
    """Learn the gates round by round; each round removes one layer (`oneshot`: one round removes them all).

    A step whose loss or gradient is not finite is not applied.

    Args:
        model: weights stay frozen and untouched unless `select.train_weights`.
        tokens: calibration windows, int64 `[samples, seq]`.
        count: how many layers to choose.

    Returns:
        The layers in order of choice. The history has one entry per step: round, step, loss, lm_loss, and by layer
        gates, gradients (mean and per sequence), D; bypassed and protected layers are null there.

    Raises:
        Diverged: loss or gradient was not finite in three steps in a row.
        Interrupted: the run was asked to end; its state is saved.
    """
    settings, batch = config.select, config.data.batch or BATCH
    allowed = _unprotected(model, config, count, session)
    model.eval()  # no dropout: the gates measure the layers as they are used
    with (
        _trainable(model, settings.train_weights) as masters,
        ExitStack() as during,  # ends after the gates, whose bypasses lie over it
        LayerGates(model, mode=settings.gate_mode, layers=allowed) as gates,
        session.keeper.steps(),
    ):
        learning = Learning(
            model=model,
            config=settings,
            session=session,
            gates=gates,
            alive=allowed,
            tokens=tokens,
            count=count,
            order=WindowOrder(len(tokens), batch, config.seed),
            steps=settings.steps_per_round or -(-len(tokens) // batch),
            masters=masters,
            weights=session.group.own(dict(model.named_parameters())) if settings.train_weights else {},
        )
        window = tokens[:1].to(gates.values.device)
        with masters.autocast:
            learning.loss = session.loss(model, window, reproducible=config.run.deterministic)
        with gates.neutral():
            learning.stand_ins = make_stand_ins(learning, config)
        learning.cost = 0 if learning.stand_ins is None else math.ceil(learning.stand_ins.cost)
        memory = session.plan("select", batch * tokens.shape[1], lambda: plan_of(learning, batch))
        if config.run.compile and config.run.offload == "none":
            during.enter_context(compiled_layers(model))
        elif config.run.compile:
            session.events.note("run.compile is for stage 2 only here: streamed layers are not compiled.")
        during.enter_context(recomputed(model, memory.recomputed))
        begin_or_resume(learning)
        _choose(learning)
        if settings.train_weights:
            _discard_gates(learning)
    return Selection(learning.chosen, learning.history, learning.cost, learning.rounds)


def _choose(learning: Learning) -> None:
    """Round by round, or what an interrupted run had still to do; then the second look."""
    settings, session = learning.config, learning.session
    with ExitStack() as standing:
        if 0 < len(learning.chosen) < learning.count:  # of a resumed run: each was fitted before the next one went
            learning.gates.restore(learning.chosen)
            bypass_with_stand_ins(learning, learning.chosen, standing)
        while (missing := learning.count - len(learning.chosen)) > 0:
            learn_round(learning)
            _remove(learning, *_lowest(learning, missing if settings.schedule == "oneshot" else 1), standing)
            session.keeper.after_step(lambda: state_of(learning), last=True, size=state_bytes(learning))
    if settings.exchange and settings.shortlist > 1 and settings.schedule == "iterative":
        exchange(learning)


def _remove(learning: Learning, layers: list[int], stand_ins: dict[int, StandIn], standing: ExitStack) -> None:
    """Bypass what the round has chosen; the next one begins, on a model that has its stand-in until the last one."""
    layers = learning.session.group.agree(layers)
    if len(learning.chosen) + len(layers) < learning.count and layers[0] in stand_ins:
        standing.enter_context(stand_ins[layers[0]].in_place())
    learning.chosen = [*learning.chosen, *layers]
    learning.alive = [layer for layer in learning.alive if layer not in layers]
    learning.gates.bypass(layers)
    learning.index, learning.done = learning.index + 1, 0


def _lowest(learning: Learning, wanted: int) -> tuple[list[int], dict[int, StandIn]]:
    """The `wanted` lowest layers by the configured rank, or by real bypass among a shortlist of them.

    And what stood for each of these in a race of folded candidates.
    """
    gates, settings = learning.gates, learning.config
    score = learning.curvature if settings.rank == "fisher" else gates.values.detach().abs()
    ranked = sorted(learning.alive, key=lambda layer: float(score[layer]))
    found, stand_ins = Race(), dict[int, StandIn]()
    if settings.shortlist > 1:
        found, stand_ins = raced(learning, ranked[: max(settings.shortlist, wanted)], wanted)
        ranked = found.ranked
    for layer in ranked[:wanted]:
        entry = {
            "round": learning.index,
            "layer": layer,
            "gate": float(gates.values[layer].detach()),
            "curvature": float(learning.curvature[layer]),
            **told(found, stand_ins),
            "gates": by_layer(learning.alive, gates.values.tolist()),
            "curvatures": by_layer(learning.alive, learning.curvature.tolist()),
        }
        learning.rounds.append(entry)
        learning.session.events.emit("round", **entry)
    return ranked[:wanted], stand_ins


def _discard_gates(learning: Learning) -> None:
    """Stage 2 goes on with the trained weights but without the gates that they were trained with: log the jump."""
    gates, tokens = learning.gates, learning.tokens[:JUMP_WINDOWS]
    gates.restore(gates.bypassed)
    with_gates = mean_loss(learning.model, tokens)
    with gates.neutral():
        without_gates = mean_loss(learning.model, tokens)
    learning.session.events.emit("gates_discarded", loss_with_gates=with_gates, loss_without_gates=without_gates)


def _unprotected(model: PreTrainedModel, config: TRSPConfig, count: int, session: Session) -> list[int]:
    """The layers that carry a gate. In output mode the last one must not: the final norm removes its scale."""
    allowed = candidates(model, config)
    last = candidates(model, config, protect=False)[-1]
    if config.select.gate_mode == "output" and last in allowed and len(allowed) > count:
        allowed.remove(last)
        session.events.note(
            f"layer {last} carries no gate: in output mode the final norm removes its scale, so that the l1 penalty "
            "alone would choose it; select.protect_last=1 says the same."
        )
    return allowed


@contextmanager
def _trainable(model: PreTrainedModel, train: bool) -> Iterator[Masters]:
    """All weights frozen, or all trained as fp32 copies. Flags come back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(train)
    try:
        with fp32_weights(model) if train else nullcontext(Masters()) as masters:
            yield masters
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
