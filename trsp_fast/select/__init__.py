"""Which layers to remove: one contract for TRSP's stage 1 and its rivals."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.session import Session
from trsp_fast.errors import UserError
from trsp_fast.models.offload import placed
from trsp_fast.run.events import Events
from trsp_fast.select import angular, shortened, shortgpt, sleb, trivial, trsp
from trsp_fast.select.contract import Selection, candidates

# (model, tokens, count, config, session) -> Selection
METHODS: dict[str, Callable[[PreTrainedModel, Tensor, int, TRSPConfig, Session], Selection]] = {
    "trsp": trsp.select,
    "shortgpt": shortgpt.select,
    "sleb": sleb.select,
    "angular": angular.select,
    "shortened": shortened.select,
    "last": trivial.last,
    "first": trivial.first,
    "random": trivial.random,
}


def choose_layers(
    model: PreTrainedModel,
    tokens: Tensor,
    config: TRSPConfig,
    events: Events | None = None,
    *,
    session: Session | None = None,
) -> Selection:
    """Choose the layers that `config` asks to remove, by `config.select.method`, with the evidence for the choice.

    The model comes back as it was, except its weights under `select.train_weights`. `session` is what a run carries
    from stage to stage; without one, `events` are its listeners.

    Raises:
        UserError: the amount cannot be removed, also after protection; see `TRSPConfig.layer_count`.
    """
    total = candidates(model, config, protect=False)
    count = config.layer_count(len(total))
    if count > len(candidates(model, config)):
        raise UserError(
            f"{count} layers are to go but only {len(candidates(model, config))} of {len(total)} are not protected "
            "(trsp-fast plan says why); remove fewer or protect fewer."
        )
    training, tokens = model.training, tokens[: config.select.samples or None]
    try:
        with placed(model, config):
            return METHODS[config.select.method](model, tokens, count, config, session or Session(events or Events()))
    finally:
        model.train(training)


def select_layers(
    model: PreTrainedModel,
    tokens: Tensor,
    method: str = "trsp",
    *,
    ratio: float | None = None,
    num_layers: int | None = None,
    config: TRSPConfig | None = None,
    seed: int = 0,
) -> list[int]:
    """The layers to remove, ascending.

    Args:
        model: a transformers causal language model with L decoder layers.
        tokens: calibration windows, int64 `[samples, seq]`.
        method: `trsp`, `shortgpt`, `sleb`, `angular`, `shortened`, `last`, `first` or `random`; see trsp_fast.select.
        ratio: share of the layers, floor(ratio*L + 0.5) of them; or `num_layers`, or a whole `config`.

    Raises:
        UserError: an unknown method, or an amount that cannot be removed.
    """
    if config is None:
        values: dict[str, Any] = {"ratio": ratio, "num_layers": num_layers, "seed": seed, "select": {"method": method}}
        config = TRSPConfig.from_dict(values)
    return sorted(choose_layers(model, tokens, config).layers)
