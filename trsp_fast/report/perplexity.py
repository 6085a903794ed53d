"""Perplexity, by the standard protocol."""

import math

from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.engine.objective import INFERENCE_BATCH, mean_loss


def perplexity(model: PreTrainedModel, tokens: Tensor, *, batch: int = INFERENCE_BATCH) -> float:
    """exp of the mean next-token loss over non-overlapping windows.

    Args:
        model: a transformers causal language model.
        tokens: int64 `[windows, seq]`; every window starts without context, its first token is not predicted.
        batch: windows per forward pass.
    """
    loss = mean_loss(model, tokens, batch)
    return math.exp(loss) if loss < 700 else math.inf
