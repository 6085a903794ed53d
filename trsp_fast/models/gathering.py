"""What code around a layer must know where its weights are divided among processes (see trsp_fast.models.sharded)."""

import torch
from torch import Tensor, nn


def is_divided(module: nn.Module) -> bool:
    """Whether FSDP2 gathers this module's weights; told by its methods, as importing FSDP takes a second."""
    return hasattr(module, "unshard") and hasattr(module, "reshard")


def own_class(module: nn.Module) -> type:
    """The module's class; FSDP gives a divided one a class of two parents, its own and then this."""
    return type(module).__bases__[-1] if is_divided(module) else type(module)


@torch.no_grad()
def own_rows(tensor: Tensor) -> Tensor:
    """This process's part of a weight, in the weight's own memory; a tensor that is not divided is its own."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def round_rows(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give this process's rows the values that they have in a checkpoint with these dtypes."""
    for name, parameter in model.named_parameters():
        rows = own_rows(parameter)
        rows.copy_(rows.to(dtypes[name]))


def gather_before_backward(layer: nn.Module, *tensors: Tensor | None) -> None:
    """Have the layer's weights whole when the gradient of one of these tensors arrives.

    They come from the layer's weights but are no output of the layer, which alone FSDP watches.
    """
    if is_divided(layer):
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(lambda _gradient: layer.unshard())  # type: ignore[operator]
