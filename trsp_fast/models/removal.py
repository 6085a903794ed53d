"""Taking layers out in memory: rebuild the model around the same parameters, never patch the old one."""

import copy
from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from trsp_fast.config import checked_layers
from trsp_fast.errors import UserError
from trsp_fast.models.families import layer_stack, slice_config, sliced_tensors
from trsp_fast.models.gathering import own_class


def remove_layers(model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """A new model without `layers`, holding the very same parameters (same objects, so same storage, ties and grads).

    Only where a tensor holds a piece per layer (the per-layer embeddings of Gemma 3n and 4) is there a new one.

    The configuration is sliced and a model built from it on the meta device, so that everything that depends on a
    layer's index (cache slots, layer types, rotary choices) is made anew; the renamed tensors are then moved in.

    Args:
        model: a transformers causal language model; it stays usable, and shares its weights with the result.
        layers: indices to remove, each once.

    Returns:
        A model of the same class, with dtype, device, training mode and generation configuration kept.

    Raises:
        UserError: layers out of range or repeated, or the rebuilt model does not have exactly the remaining tensors.
    """
    stack = layer_stack(model)
    removed = checked_layers(layers, len(stack))
    kept = [index for index in range(len(stack)) if index not in removed]
    values = model.config.to_dict()
    small = without_weights(model, kept)
    for kind in ("parameters", "buffers"):
        tensors = kept_tensors(model, kept, kind)
        for end, dimension in sliced_tensors(values):
            tensors |= {
                name: _pieces(tensor, dimension, kept, len(stack))
                for name, tensor in tensors.items()
                if name.endswith(end)
            }
        move_in(small, tensors, kind)
    small.train(model.training)
    small.generation_config = copy.deepcopy(model.generation_config)
    for source, target in zip((stack.layers[i] for i in kept), layer_stack(small).layers, strict=True):
        target.train(source.training)
    return small


def without_weights(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """The model's architecture with the layers `kept` only, on the meta device."""
    config = type(model.config).from_dict(slice_config(model.config.to_dict(), kept))
    config._attn_implementation = model.config._attn_implementation
    stated = model.config.dtype  # save_pretrained leaves its name there, which some models cannot be built with
    config.dtype = getattr(torch, stated) if isinstance(stated, str) else stated
    with torch.device("meta"):
        return own_class(model)(config)


def kept_tensors(model: PreTrainedModel, kept: list[int], kind: str) -> dict[str, torch.Tensor]:
    """The model's `parameters` or `buffers` but those of layers that go, under their names after the cut."""
    stack = layer_stack(model)
    new_names = {f"{stack.path}.{old}": f"{stack.path}.{new}" for new, old in enumerate(kept)}
    gone = tuple(f"{stack.path}.{old}." for old in range(len(stack)) if old not in kept)
    tensors = getattr(model, f"named_{kind}")(remove_duplicate=False)
    return {_renamed(name, stack.path, new_names): tensor for name, tensor in tensors if not name.startswith(gone)}


def _renamed(name: str, path: str, new_names: dict[str, str]) -> str:
    if not name.startswith(f"{path}."):
        return name
    index, dot, rest = name[len(path) + 1 :].partition(".")
    return f"{new_names[f'{path}.{index}']}{dot}{rest}"


def _pieces(tensor: torch.Tensor, dimension: int, kept: list[int], count: int) -> torch.Tensor:
    """A copy of the pieces of the layers that stay, where a tensor holds one piece per layer along a dimension."""
    pieces = tensor.detach().unflatten(dimension, (count, -1))
    chosen = pieces.index_select(dimension, torch.tensor(kept, device=tensor.device)).flatten(dimension, dimension + 1)
    return torch.nn.Parameter(chosen, requires_grad=tensor.requires_grad)


def move_in(model: PreTrainedModel, tensors: dict[str, torch.Tensor], kind: str) -> None:
    """Put `tensors` in place of the model's parameters or buffers; names and shapes must match exactly."""
    wanted = dict(getattr(model, f"named_{kind}")(remove_duplicate=False))
    odd = sorted(wanted.keys() ^ tensors.keys()) or sorted(
        name for name, tensor in tensors.items() if wanted[name].shape != tensor.shape
    )
    if odd:
        raise UserError(
            f"{type(model).__name__} without these layers has other tensors than the layers that stay "
            f"({odd[0]}, {len(odd)} in all); its layers are not independent, choose other layers or another model."
        )
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        getattr(model.get_submodule(owner), f"_{kind}")[leaf] = tensor
