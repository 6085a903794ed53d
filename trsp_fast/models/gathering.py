"""What code around a layer must know where its weights are divided among processes (see trsp_fast.models.sharded)."""

from torch import Tensor, nn


def is_divided(module: nn.Module) -> bool:
    """Whether FSDP2 gathers this module's weights; told by its methods, as importing FSDP takes a second."""
    return hasattr(module, "unshard") and hasattr(module, "reshard")


def own_class(module: nn.Module) -> type:
    """The module's class; FSDP gives a divided one a class of two parents, its own and then this."""
    return type(module).__bases__[-1] if is_divided(module) else type(module)


def gather_before_backward(layer: nn.Module, *tensors: Tensor | None) -> None:
    """Have the layer's weights whole when the gradient of one of these tensors arrives.

    They come from the layer's weights but are no output of the layer, which alone FSDP watches.
    """
    if is_divided(layer):
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(lambda _gradient: layer.unshard())  # type: ignore[operator]
