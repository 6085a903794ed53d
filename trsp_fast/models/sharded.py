"""A model whose weights are divided among processes by torch's FSDP2: one group per decoder layer, one for the rest.

Every process keeps its rows of each weight. A layer's weights are gathered for its own forward and backward pass only.
"""

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from trsp_fast.errors import UserError
from trsp_fast.models.families import layer_stack, sliced_tensors
from trsp_fast.models.removal import kept_tensors, move_in, without_weights


def shard(model: PreTrainedModel, mesh: DeviceMesh, compute: torch.dtype, *, trained: bool) -> None:
    """Divide the weights of `model` among the processes of `mesh`, in place; whole layers are there one at a time.

    Weights that will be trained are kept in fp32 and gathered in `compute`, in which layers run; gradients are added
    up in fp32. Frozen ones are kept as they came.

    Raises:
        UserError: a weight belongs to several layers, or tensors hold a piece per layer.
    """
    _require_separate(model)
    for layer in layer_stack(model).layers:
        _divide(layer, mesh, compute, torch.float32 if trained else None)
    _divide(model, mesh, compute, torch.float32 if trained else None)
    model.requires_grad_(trained)
    _settle(model)


def copy_of(
    model: PreTrainedModel, compute: torch.dtype, *, without: Iterable[int] = (), exact: bool = True
) -> PreTrainedModel:
    """A frozen copy of a sharded model, sharded alike and without some layers; no process holds more than its rows.

    Args:
        compute: the dtype in which it runs.
        without: the layers that it lacks.
        exact: keep the weights' dtype; else they are kept in `compute`.
    """
    gone = set(without)
    kept = [index for index in range(len(layer_stack(model))) if index not in gone]
    rows = kept_tensors(model, kept, "parameters")
    copy = without_weights(model, kept)
    copy.generation_config = deepcopy(model.generation_config)
    first = next(iter(rows.values()))
    assert isinstance(first, DTensor)
    for name, parameter in copy.named_parameters():
        parameter.data = parameter.data.to(rows[name].dtype if exact else compute)
    for layer in [*layer_stack(copy).layers, copy]:
        _divide(layer, first.device_mesh, compute, None)
    copy.to_empty(device=first.device)
    move_in(copy, kept_tensors(model, kept, "buffers"), "buffers")
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            own_rows(parameter).copy_(own_rows(rows[name]))
    copy.eval().requires_grad_(False)
    _settle(copy)
    return copy


def own_rows(tensor: Tensor) -> Tensor:
    """This process's part of a weight, in the weight's own memory; a tensor that is not divided is its own."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def first_row(tensor: Tensor) -> int:
    """Where this process's rows begin in the whole weight: torch divides the first dimension as `chunk` does."""
    assert isinstance(tensor, DTensor)
    part, parts = tensor.device_mesh.get_local_rank(tensor.device_mesh.ndim - 1), tensor.device_mesh.shape[-1]
    return min(len(tensor), part * -(-len(tensor) // parts))


def whole(tensor: Tensor) -> Tensor:
    """A weight in one piece, in every process; all processes must ask for it."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _divide(module: nn.Module, mesh: DeviceMesh, compute: torch.dtype, dtype: torch.dtype | None) -> None:
    """One FSDP group of the module's parameters that are in none yet; gradients add up over the processes."""
    if dtype is not None:
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor) and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    # The root's weights too are let go of after forward, so that a model's parameters are its rows between passes.
    group = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    group.set_gradient_divide_factor(1.0)
    group.set_force_sum_reduction_for_comms(True)  # a factor by itself would ask for an operation that gloo lacks


def _settle(model: PreTrainedModel) -> None:
    """A first pass, in which FSDP takes the dtypes of gradients from the weights that want them: later is too late."""
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device), use_cache=False)


def _require_separate(model: PreTrainedModel) -> None:
    if sliced_tensors(model.config.to_dict()):
        raise UserError(
            "run.parallel is fsdp but this model has tensors with a piece for each layer, which rows cannot hold; give "
            "ddp."
        )
    homes: dict[nn.Parameter, str] = {}
    stack = layer_stack(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = name.startswith(f"{stack.path}.")
        home = name[len(stack.path) + 1 :].partition(".")[0] if inside else ""
        if homes.setdefault(parameter, home) != home:
            raise UserError(f"run.parallel is fsdp but {name} is a weight of several layers; give ddp.")
        if parameter.dtype == torch.float64:
            raise UserError(f"run.parallel is fsdp but {name} is in float64; give ddp, or convert the model.")

