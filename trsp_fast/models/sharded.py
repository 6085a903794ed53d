"""A model whose weights are divided among processes by torch's FSDP2: one group per decoder layer, one for the rest.

Every process keeps its rows of each weight. A layer's weights are gathered for its own forward and backward pass only.
"""

from collections.abc import Iterable
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from trsp_fast.errors import UserError
from trsp_fast.models.families import layer_stack, sliced_tensors
from trsp_fast.models.gathering import own_rows
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
    model: PreTrainedModel, mesh: DeviceMesh, compute: torch.dtype, *, without: Iterable[int] = (), exact: bool = True
) -> PreTrainedModel:
    """A frozen copy of a sharded model, sharded alike and without some layers; no process holds more than its rows.

    Args:
        mesh: of the processes that the model is divided among.
        compute: the dtype in which it runs.
        without: the layers that it lacks.
        exact: keep the weights' dtype; else they are kept in `compute`.
    """
    gone = set(without)
    kept = [index for index in range(len(layer_stack(model))) if index not in gone]
    rows = kept_tensors(model, kept, "parameters")
    copy = without_weights(model, kept)
    copy.generation_config = deepcopy(model.generation_config)
    for name, parameter in copy.named_parameters():
        parameter.data = parameter.data.to(rows[name].dtype if exact else compute)
    for layer in [*layer_stack(copy).layers, copy]:
        _divide(layer, mesh, compute, None)
    copy.to_empty(device=next(iter(rows.values())).device)
    move_in(copy, kept_tensors(model, kept, "buffers"), "buffers")
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            own_rows(parameter).copy_(own_rows(rows[name]))
    copy.eval().requires_grad_(False)
    _settle(copy)
    return copy


@torch.no_grad()
def whole(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A weight in one piece, in every process; all processes must ask for it.

    torch's own `full_tensor` would go by the mesh of an earlier run, where one has had equal ranks.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    rows, (chunk, parts) = own_rows(tensor), chunks(tensor, mesh)
    padded = rows.new_zeros(chunk, *tensor.shape[1:])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(parts * chunk, *tensor.shape[1:])
    dist.all_gather(list(gathered.chunk(parts)), padded, group=mesh.get_group(mesh.ndim - 1))
    return gathered[: len(tensor)]


def first_row(tensor: Tensor, mesh: DeviceMesh) -> int:
    """Where this process's rows begin in the whole weight."""
    return min(len(tensor), mesh.get_local_rank(mesh.ndim - 1) * chunks(tensor, mesh)[0])


def chunks(tensor: Tensor, mesh: DeviceMesh) -> tuple[int, int]:
    """Rows of a part and the number of parts: the first parts are full, as torch.chunk has them."""
    parts = mesh.shape[-1]
    return -(-len(tensor) // parts), parts


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
