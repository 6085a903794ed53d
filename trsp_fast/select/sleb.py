"""SLEB (arXiv 2402.09025): greedily bypass the layer without which the calibration loss is smallest."""

from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.objective import mean_loss
from trsp_fast.engine.session import Session
from trsp_fast.models.gates import bypassed
from trsp_fast.select.contract import Selection, candidates


def losses_without(model: PreTrainedModel, tokens: Tensor, gone: list[int], layers: list[int]) -> dict[int, float]:
    """Calibration loss with `gone` and one more of `layers` bypassed, for each of `layers`."""
    losses = {}
    for layer in layers:
        with bypassed(model, [*gone, layer]):
            losses[layer] = mean_loss(model, tokens)
    return losses


def select(model: PreTrainedModel, tokens: Tensor, count: int, config: TRSPConfig, session: Session) -> Selection:
    """`count` rounds, each trying every layer that is left."""
    chosen: list[int] = []
    history, cost = [], 0
    for round_index in range(count):
        alive = [layer for layer in candidates(model, config) if layer not in chosen]
        losses = losses_without(model, tokens, chosen, alive)
        cost += len(tokens) * len(alive)
        chosen.append(min(alive, key=lambda layer: losses[layer]))
        entry = {"round": round_index, "layer": chosen[-1], "losses": losses}
        history.append(entry)
        session.events.emit("round", **entry)
    return Selection(chosen, history, cost, history)
