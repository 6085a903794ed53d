"""Perplexity, by the standard protocol."""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.engine.distributed import Group
from trsp_fast.engine.objective import INFERENCE_BATCH, mean_loss


def perplexity(
    model: PreTrainedModel, tokens: Tensor, *, batch: int = INFERENCE_BATCH, group: Group | None = None
) -> float:
    """exp of the mean next-token loss over non-overlapping windows.

    Args:
        model: a transformers causal language model.
        tokens: int64 `[windows, seq]`; every window starts without context, its first token is not predicted.
        batch: windows per forward pass.
        group: processes that share the windows, each with this model.
    """
    group, total = group or Group(), torch.zeros((), dtype=torch.float64)
    for rows, weight in group.parts(torch.arange(len(tokens)), batch):
        total += mean_loss(model, tokens[rows], batch) * weight
    group.sum([total])
    loss = float(total)
    return math.exp(loss) if loss < 700 else math.inf
