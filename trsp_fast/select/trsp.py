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
from trsp_fast.select.gate_learning import (
    Learning,
    begin_or_resume,
    by_layer,
    learn_round,
    plan_of,
    state_bytes,
    state_of,
)
from trsp_fast.select.race import race
from trsp_fast.select.stand_in import StandIn, StandIns

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
            learning.stand_ins = _stand_ins(learning, config)
        learning.cost = 0 if learning.stand_ins is None else math.ceil(learning.stand_ins.cost)
        memory = session.plan("select", batch * tokens.shape[1], lambda: plan_of(learning, batch))
        if config.run.compile and config.run.offload == "none":
            during.enter_context(compiled_layers(model))
        elif config.run.compile:
            session.events.note("run.compile is for stage 2 only here: streamed layers are not compiled.")
        during.enter_context(recomputed(model, memory.recomputed))
        begin_or_resume(learning)
        _stand_in_again(learning, during)
        while (missing := count - len(learning.chosen)) > 0:
            learn_round(learning)
            _remove(learning, *_lowest(learning, missing if settings.schedule == "oneshot" else 1), during)
            session.keeper.after_step(lambda: state_of(learning), last=True, size=state_bytes(learning))
        if settings.train_weights:
            _discard_gates(learning)
    return Selection(learning.chosen, learning.history, learning.cost, learning.rounds)


def _stand_ins(learning: Learning, config: TRSPConfig) -> StandIns | None:
    """None where candidates are judged by their cut: where that is asked for, or where no weight may change."""
    settings, session = config.select, learning.session
    if settings.judge == "cut" or settings.shortlist < 2:
        return None
    obstacles = {
        "all weights are trained": settings.train_weights,
        "the layers' weights are in host memory": config.run.offload != "none",
        "their weights are divided": session.group.sharded,
    }
    reason, stand_ins = next((reason for reason, applies in obstacles.items() if applies), None), None
    if reason is None:
        stand_ins = StandIns(learning.model, learning.tokens, session.group)
        reason = stand_ins.obstacle()
    if reason:
        session.events.note(f"the layers to choose from are judged by their cut, not by their fold: {reason}.")
        return None
    return stand_ins


def _remove(learning: Learning, layers: list[int], stand_ins: dict[int, StandIn], during: ExitStack) -> None:
    """Bypass what the round has chosen; the next one begins, on a model that has its stand-in until stage 1 ends."""
    layers = learning.session.group.agree(layers)
    if len(learning.chosen) + len(layers) < learning.count and layers[0] in stand_ins:
        during.enter_context(stand_ins[layers[0]].in_place())
    learning.chosen = [*learning.chosen, *layers]
    learning.alive = [layer for layer in learning.alive if layer not in layers]
    learning.gates.bypass(layers)
    learning.index, learning.done = learning.index + 1, 0


def _stand_in_again(learning: Learning, during: ExitStack) -> None:
    """What stood for the layers that a resumed run has chosen already: each was fitted before the next one went."""
    if learning.stand_ins is None or not learning.chosen:
        return
    gates = learning.gates
    gates.restore(learning.chosen)
    for layer in learning.chosen:
        with gates.neutral():
            if stand_in := learning.stand_ins.of([layer]).get(layer):
                during.enter_context(stand_in.in_place())
        gates.bypass([layer])


def _lowest(learning: Learning, wanted: int) -> tuple[list[int], dict[int, StandIn]]:
    """The `wanted` lowest layers by the configured rank, or by real bypass among a shortlist of them.

    And what stood for each of these in a race of folded candidates.
    """
    gates, settings = learning.gates, learning.config
    score = learning.curvature if settings.rank == "fisher" else gates.values.detach().abs()
    ranked = sorted(learning.alive, key=lambda layer: float(score[layer]))
    judged: dict[int, dict[str, float]] = {}
    stand_ins: dict[int, StandIn] = {}
    if settings.shortlist > 1:
        short = ranked[: max(settings.shortlist, wanted)]
        with gates.neutral():
            if learning.stand_ins is not None:
                before = learning.stand_ins.cost
                stand_ins = learning.stand_ins.of(short)
                learning.cost += math.ceil(learning.stand_ins.cost - before)
            found = race(learning.model, learning.tokens, short, wanted, learning.session.group, stand_ins)
        learning.cost += math.ceil(found.cost)
        judged = {
            layer: {"loss": float(losses.mean()), "windows": len(losses)} for layer, losses in found.losses.items()
        }
        ranked = found.ranked
    for layer in ranked[:wanted]:
        entry = {
            "round": learning.index,
            "layer": layer,
            "gate": float(gates.values[layer].detach()),
            "curvature": float(learning.curvature[layer]),
            "judged": judged,
            "folded": sorted(stand_ins),
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
