"""Angular distance (Gromov et al., arXiv 2403.17887): remove the contiguous layers that turn the last token least."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.objective import INFERENCE_BATCH
from trsp_fast.engine.session import Session
from trsp_fast.errors import UserError
from trsp_fast.models.families import layer_stack
from trsp_fast.models.gates import sequences_first
from trsp_fast.select.contract import Selection, candidates


@torch.no_grad()
def last_token_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What enters each layer at every window's last token, then what leaves the last layer, before the final norm.

    Args:
        tokens: calibration windows, int64 `[samples, seq]`.

    Returns:
        fp32 `[layers + 1, samples, hidden]` in host memory. Where a token has several streams (Gemma 3n), they are
        one vector.
    """
    layers, device = layer_stack(model).layers, next(model.parameters()).device
    found: list[list[Tensor]] = [[] for _ in range(len(layers) + 1)]

    def hook(index: int):  # type: ignore[no-untyped-def]
        def keep(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            found[index].append(_last_token(args[0] if args else kwargs["hidden_states"]))
            if index == len(layers) - 1:
                found[-1].append(_last_token(output[0] if isinstance(output, tuple) else output))

        return keep

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    model.eval()
    try:
        for batch in tokens.split(INFERENCE_BATCH):
            model(input_ids=batch.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([torch.cat(parts) for parts in found])


def _last_token(states: Tensor) -> Tensor:
    return sequences_first(states)[..., -1, :].flatten(1).float().cpu()


def angular_distances(states: Tensor, count: int) -> list[float]:
    """Mean over sequences of arccos(cos(x_l, x_{l+count})) / pi, by start l (the paper's equation 4), in [0, 1].

    In fp64: near 0 the arccos magnifies rounding, fp32 would tell no two distances below 1e-4 apart.
    """
    states = states.double()
    cosines = F.cosine_similarity(states[:-count], states[count:], dim=-1).clamp(-1, 1)
    return (cosines.arccos() / math.pi).mean(-1).tolist()


def select(model: PreTrainedModel, tokens: Tensor, count: int, config: TRSPConfig, session: Session) -> Selection:
    """The `count` layers in a row with the smallest angular distance, all from one measurement.

    Raises:
        UserError: no `count` layers in a row may go.
    """
    total, allowed = len(layer_stack(model)), set(candidates(model, config))
    starts = [start for start in range(total - count + 1) if allowed.issuperset(range(start, start + count))]
    if not starts:
        raise UserError(
            f"angular distance takes {count} layers in a row, and no {count} of the layers that may go are in a row "
            "(trsp-fast plan says which may go); remove fewer, protect fewer or choose another method."
        )
    distances = angular_distances(last_token_states(model, tokens), count)
    history = [{"start": start, "angular_distance": distance} for start, distance in enumerate(distances)]
    for entry in history:
        session.events.emit("candidate", **entry)
    first = min(starts, key=lambda start: distances[start])
    return Selection(list(range(first, first + count)), history, len(tokens))
