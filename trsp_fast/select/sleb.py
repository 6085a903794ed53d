"""SLEB (arXiv 2402.09025): greedily bypass the layer without which the calibration loss is smallest."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.objective import INFERENCE_BATCH, losses_by_window
from trsp_fast.engine.session import Session
from trsp_fast.models.bypass import bypassed
from trsp_fast.models.gathering import is_divided
from trsp_fast.models.prefix import Prefix
from trsp_fast.run.state import State
from trsp_fast.select.contract import Selection, candidates
from trsp_fast.select.stand_in import StandIn

PROOF = 3  # passes of one window to find out whether the prefix can be reused; where less is to be gained, it is not


@dataclass(frozen=True)
class Judgement:
    """Losses by bypassed layer, and what they took.

    by_window: float64 by bypassed layer, the loss of each window.
    cost: in forward passes of one window; a pass through some of the alive layers counts as their share of all that
        were alive before the candidate went.
    obstacle: why the unchanged prefix could not be reused, None where it was or where there was nothing to reuse.
    """

    by_window: dict[int, Tensor]
    cost: float
    obstacle: str | None = None

    @property
    def losses(self) -> dict[int, float]:
        """Mean over the windows by bypassed layer."""
        return {layer: float(losses.mean()) for layer, losses in self.by_window.items()}


@torch.no_grad()
def judge_layers(
    model: PreTrainedModel,
    tokens: Tensor,
    gone: list[int],
    layers: list[int],
    stand_ins: Mapping[int, StandIn] | None = None,
) -> Judgement:
    """The losses with `gone` and one more of `layers` bypassed, for each of `layers`; its stand-in is in its place.

    What lies below a candidate is the same for all above it and runs once. Candidates are tried upwards. The states
    that enter one are kept for a batch of windows until the next one needs them one piece further up, so that one batch
    of hidden states is all the memory this takes, and every loss is that of the plain form, bit for bit (the batches
    are the same). Where two candidates on one window show that it is not, the plain form is used; where layers hand on
    more than hidden states, the kept states stay below them.
    """
    device, training, stand_ins = next(model.parameters()).device, model.training, stand_ins or {}
    model.eval()
    try:
        with bypassed(model, gone):
            prefix = Prefix(model)
            lowest = {layer: stand_ins[layer].below if layer in stand_ins else layer for layer in sorted(layers)}
            lowest = dict(sorted(lowest.items(), key=lambda one: one[1]))
            starts: dict[int, int] = {}
            obstacle, cost = None, 0.0
            # Divided weights come and go with whole passes, which all processes must run alike
            if not is_divided(model) and _gain(prefix, len(tokens), lowest) > PROOF:
                starts, obstacle = _starts(prefix, tokens[:1].to(device), lowest)
                cost += PROOF
            if starts:
                parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
                for part in tokens.split(INFERENCE_BATCH):
                    cost += _add_batch(prefix, part.to(device), starts, stand_ins, parts)
                return Judgement({layer: torch.cat(found) for layer, found in parts.items()}, cost, obstacle)
        by_window = plain_by_window(model, tokens, gone, layers, stand_ins)
        return Judgement(by_window, cost + len(tokens) * len(layers), obstacle)
    finally:
        model.train(training)


@torch.no_grad()
def plain_by_window(
    model: PreTrainedModel,
    tokens: Tensor,
    gone: list[int],
    layers: list[int],
    stand_ins: Mapping[int, StandIn] | None = None,
) -> dict[int, Tensor]:
    """What `judge_layers` finds, by a whole pass for each layer and batch; the model must be in evaluation mode."""
    device, found = next(model.parameters()).device, {}
    for layer in layers:
        with bypassed(model, [*gone, layer]), _in_place(stand_ins or {}, layer):
            parts = [losses_by_window(model, part.to(device)).cpu() for part in tokens.split(INFERENCE_BATCH)]
        found[layer] = torch.cat(parts)
    return found


def _in_place(stand_ins: Mapping[int, StandIn], layer: int) -> AbstractContextManager[None]:
    return stand_ins[layer].in_place() if layer in stand_ins else nullcontext()


def _starts(prefix: Prefix, window: Tensor, lowest: dict[int, int]) -> tuple[dict[int, int], str | None]:
    """Where each candidate's pass begins, empty for the plain form; and what is in the way of more.

    It takes `PROOF` passes of the window: one to look, one whole, one in two halves.
    """
    highest, obstacle = prefix.highest(window), None
    if highest < sorted(lowest.values())[-2]:
        obstacle = f"layer {highest} hands on more than hidden states"
    starts = _nearest(lowest, highest)
    if top := max(starts.values()):
        if not prefix.agrees(window, top, prefix.entering(window, top), [max(lowest)]):
            return {}, f"the loss from the states that enter layer {top} on is another"
        return starts, obstacle
    return {}, obstacle


def _nearest(lowest: dict[int, int], highest: int) -> dict[int, int]:
    """For each candidate the next layer, below the lowest that is another for it or that one, where a pass may begin.

    To stop at the last candidate's would gain nothing: no other needs what is below it.
    """
    places = [0, *(place for place in list(lowest.values())[:-1] if place <= highest)]
    return {layer: max(place for place in places if place <= own) for layer, own in lowest.items()}


def _gain(prefix: Prefix, samples: int, lowest: dict[int, int]) -> float:
    """Passes of one window that are saved at most."""
    skipped = [prefix.alive(0, start) for start in _nearest(lowest, len(prefix.stack)).values()]
    return (sum(skipped) - max(skipped)) * samples / max(1, prefix.alive(0, len(prefix.stack)))


def _add_batch(
    prefix: Prefix,
    tokens: Tensor,
    starts: dict[int, int],
    stand_ins: Mapping[int, StandIn],
    losses: dict[int, list[Tensor]],
) -> float:
    """Add one batch's losses to `losses`; the cost."""
    ran, start, states = 0, 0, None
    for layer, wanted in starts.items():
        if wanted > start:
            ran += prefix.alive(start, wanted)
            states = prefix.entering(tokens, wanted, start, states)
            start = wanted
        # A copy: a layer that wrote into its input would change the later candidates' states.
        own = None if states is None else states.clone()
        with prefix.skipped(start, own, [layer]), _in_place(stand_ins, layer):
            losses[layer].append(losses_by_window(prefix.model, tokens).cpu())
        ran += prefix.alive(start, layer) + prefix.alive(layer + 1, len(prefix.stack))
    return ran * len(tokens) / max(1, prefix.alive(0, len(prefix.stack)))


def select(model: PreTrainedModel, tokens: Tensor, count: int, config: TRSPConfig, session: Session) -> Selection:
    """`count` rounds, each trying every layer that is left. The state is saved after every round."""
    chosen: list[int] = []
    history, cost = [], 0.0
    if state := session.keeper.found("select by SLEB"):
        chosen, history, cost = state.values["chosen"], state.values["history"], state.values["cost"]
        session.events.emit("resumed", stage="select", round=len(chosen), step=0)

    def save() -> State:
        return State("select by SLEB", len(chosen), {"chosen": chosen, "history": history, "cost": cost})

    with session.keeper.steps():
        for index in range(len(chosen), count):
            alive = [layer for layer in candidates(model, config) if layer not in chosen]
            judged = judge_layers(model, tokens, chosen, alive)
            cost += judged.cost
            if judged.obstacle and index == 0:
                session.events.note(f"SLEB computes more than it should need to: {judged.obstacle}.")
            chosen.append(session.group.agree(min(alive, key=lambda layer: judged.losses[layer])))
            entry = {"round": index, "layer": chosen[-1], "losses": judged.losses}
            history.append(entry)
            session.events.emit("round", **entry)
            session.keeper.after_step(save, last=True)
    return Selection(chosen, history, math.ceil(cost), history)
