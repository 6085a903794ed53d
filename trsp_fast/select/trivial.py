"""Choices that look at nothing: the floor that every method must beat."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.session import Session
from trsp_fast.select.contract import Selection, candidates


def last(model: PreTrainedModel, _tokens: Tensor, count: int, config: TRSPConfig, _session: Session) -> Selection:
    """The last layers that may go."""
    return Selection(candidates(model, config)[-count:])


def first(model: PreTrainedModel, _tokens: Tensor, count: int, config: TRSPConfig, _session: Session) -> Selection:
    """The first layers that may go."""
    return Selection(candidates(model, config)[:count])


def random(model: PreTrainedModel, _tokens: Tensor, count: int, config: TRSPConfig, _session: Session) -> Selection:
    """Layers drawn without replacement by `config.seed`."""
    allowed = candidates(model, config)
    order = torch.randperm(len(allowed), generator=torch.Generator().manual_seed(config.seed))
    return Selection([allowed[i] for i in order[:count]])
