"""In which dtype a run computes, trains and hands back its weights."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.models.gathering import is_divided


def run_dtype(config: TRSPConfig, device: torch.device) -> torch.dtype:
    """The dtype of a run's computation; auto: bf16 on a GPU, fp32 on the CPU."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast every floating parameter in place; buffers (rotary frequencies) keep their precision."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def compute_in(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast for the forward pass of fp32 weights in `dtype`; nothing where that is fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class Masters(NamedTuple):
    """Weights made ready for training: the autocast of their forward pass, and the bytes that they have grown by."""

    autocast: AbstractContextManager = nullcontext()
    growth: int = 0


@contextmanager
def fp32_weights(model: PreTrainedModel, trained: Iterable[nn.Parameter] | None = None) -> Iterator["Masters"]:
    """fp32 copies of the weights inside, for training; they come back in the dtype they came in.

    Args:
        trained: the weights concerned; all by default.
    """
    if is_divided(model):  # its weights are fp32 all along, and come in the dtype of the computation
        yield Masters()
        return
    first = next(model.parameters())
    context = compute_in(first.device, first.dtype)
    dtypes = [(parameter, parameter.dtype) for parameter in (model.parameters() if trained is None else trained)]
    for parameter, _ in dtypes:
        parameter.data = parameter.data.float()
    growth = sum((4 - own.itemsize) * parameter.numel() for parameter, own in dtypes)
    try:
        yield Masters(context, growth)
    finally:
        for parameter, own in dtypes:
            parameter.data = parameter.data.to(own)


class SourceWeights:
    """Remembers the dtype a model came in, so that its export has it too and untrained tensors keep their bytes.

    Values survive a cast to a wider dtype and back; where the run's dtype is narrower, the original tensors are kept
    on the CPU. Parameters are told apart by identity: removal moves the same objects into the pruned model.
    """

    def __init__(
        self, model: PreTrainedModel, dtype: torch.dtype, divided: dict[str, torch.dtype] | None = None
    ) -> None:
        """`divided`: the dtypes that the weights had before they were divided, which rounds none of them."""
        named = dict(model.named_parameters())
        self._dtypes: dict[Tensor, torch.dtype] = {
            p: p.dtype if divided is None else divided[name] for name, p in named.items()
        }
        self._originals: dict[nn.Parameter, Tensor] = {
            parameter: parameter.detach().cpu().clone()
            for parameter, own in zip(named.values(), self._dtypes.values(), strict=True)
            if divided is None and parameter.is_floating_point() and torch.promote_types(own, dtype) != dtype
        }

    def dtype(self, parameter: Tensor) -> torch.dtype:
        """Of the parameter as it came in; one that was made since has its own."""
        return self._dtypes.get(parameter, parameter.dtype)

    def adopt(self, dtypes: Mapping[nn.Parameter, torch.dtype]) -> None:
        """Parameters that were made since, and what they are to be written in."""
        self._dtypes.update({parameter: dtype for parameter, dtype in dtypes.items()})

    def restore(self, model: PreTrainedModel) -> None:
        """Cast the parameters of `model` back; one that still has its cast original's value gets the original."""
        for parameter in model.parameters():
            own, original = self._dtypes[parameter], self._originals.get(parameter)
            if original is not None and torch.equal(original.to(parameter.dtype), parameter.detach().cpu()):
                parameter.data = original.to(parameter.device)
            else:
                parameter.data = parameter.data.to(own)
