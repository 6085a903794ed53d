"""What code around a layer must know where its weights are divided among processes (see trsp_fast.models.sharded)."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_divided(module: nn.Module) -> bool:
    """Whether FSDP2 gathers this module's weights."""
    return isinstance(module, FSDPModule)


def own_class(module: nn.Module) -> type:
    """The module's class; FSDP gives a divided one a class with two parents, its own and this one."""
    return type(module).__bases__[-1] if is_divided(module) else type(module)


@torch.no_grad()
def own_rows(tensor: Tensor) -> Tensor:
    """This process's part of a weight, in the weight's own memory; a tensor that is not divided is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def round_rows(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give this process's rows the values that they have in a checkpoint with these dtypes."""
    for name, parameter in model.named_parameters():
        rows = own_rows(parameter)
        rows.copy_(rows.to(dtypes[name]))


def gather_before_backward(layer: nn.Module, *tensors: Tensor | None) -> None:
    """Have the layer's weights whole when the gradient of one of these tensors arrives.

    They come from the layer's weights but are no output of the layer, which alone FSDP watches.
    """
    if isinstance(layer, FSDPModule):
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(lambda _gradient: layer.unshard())
