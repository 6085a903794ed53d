"""Perplexity without each layer (Shortened LLaMA, arXiv 2402.02834): remove those that it misses least, all at once.

The paper's criteria by weights and gradients (Mag+, Taylor+) keep the first four and the last two layers by a rule of
thumb, that by perplexity does without. `select.protect_first` and `select.protect_last` are that rule here; nothing is
kept unless they say so.
"""

import math

from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.session import Session
from trsp_fast.select.contract import Selection, candidates
from trsp_fast.select.sleb import judge_layers


def select(model: PreTrainedModel, tokens: Tensor, count: int, config: TRSPConfig, session: Session) -> Selection:
    """The `count` layers without each of which, alone, the calibration perplexity is smallest: SLEB's first round.

    Protected layers are not measured.
    """
    judged = judge_layers(model, tokens, [], candidates(model, config))
    if judged.obstacle:
        session.events.note(f"perplexity without each layer computes more than it should need to: {judged.obstacle}.")
    history = [{"layer": layer, "perplexity": _perplexity(loss)} for layer, loss in judged.losses.items()]
    for entry in history:
        session.events.emit("candidate", **entry)
    ranked = sorted(judged.losses, key=lambda layer: judged.losses[layer])
    return Selection(ranked[:count], history, math.ceil(judged.cost))


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
