"""Processes that hold rows of every weight instead of whole copies: what Replicas do, on top of torch's FSDP2.

FSDP gathers weights and adds up their gradients inside forward and backward passes, so all processes must run the same
passes in the same order: one without rows of a batch runs a row that weighs nothing.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.distributed import PATIENCE, Group, Named, Replicas
from trsp_fast.engine.optimizers import STATE_BYTES
from trsp_fast.errors import Lost, UserError
from trsp_fast.models.free_memory import free_memory
from trsp_fast.models.gathering import own_rows
from trsp_fast.models.sharded import copy_of, first_row, shard, whole
from trsp_fast.run.divided_state import DividedStore, Part
from trsp_fast.run.state import Loaded, StateStore

FP32, COMPUTE = 4, 2  # bytes of a weight
ROOM = 0.7  # of the free memory, for what is held all the time: the rest is for activations and gathered layers


class Shards(Replicas):
    """Processes with rows of a model each: all of them share one copy, or those of each node do (HSDP)."""

    sharded = True

    def __init__(self, processes: Replicas, parts: int) -> None:
        """`parts` processes in a row hold one copy together; it divides their number."""
        vars(self).update(vars(processes))
        self.copies = self.size // parts
        self._mesh = self._make_mesh(parts)
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []

    def parts(self, rows: Tensor, micro_batch: int) -> list[tuple[Tensor, float]]:
        """As many micro-batches in every process; those that only keep step weigh 0."""
        most = -(-len(rows) // self.size)
        size = micro_batch or most
        parts = super().parts(rows, size)
        return parts + [(rows[:1], 0.0)] * (-(-most // size) - len(parts))

    def divide(self, model: PreTrainedModel, compute: torch.dtype, *, trained: bool) -> None:
        """Leave this process its rows of the model's weights; see trsp_fast.models.sharded."""
        self.compute = compute
        shard(model, self._mesh, compute, trained=trained)
        self._rows = {
            name: (first_row(weight, self._mesh), len(own_rows(weight)), len(weight))
            for name, weight in model.named_parameters()
        }

    def store(self, folder: Path | None) -> StateStore | None:
        """Where this process keeps its part of the states: the first one's folder counts, which all must see."""
        shared = self.agree(None if folder is None else str(folder))
        if shared is None:
            return None
        return DividedStore(Path(shared), Part(self.rank, self.size, self._rows, self.highest, self.agree))

    def share(self, found: Loaded | None) -> Loaded | None:
        """Every process has loaded its own."""
        return found

    def untouched(self, model: PreTrainedModel, trained: Named) -> PreTrainedModel:
        return copy_of(model, self._mesh, self.compute, exact=False)

    def without(self, model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
        """The model without some layers, divided alike: a copy of this process's rows."""
        self._pairs = []  # with the last gradients
        return copy_of(model, self._mesh, self.compute, without=layers)

    def whole(self, tensor: Tensor) -> Tensor:
        """A weight in one piece, in every process; all processes must ask for it."""
        return whole(tensor, self._mesh)

    def own(self, weights: Named) -> Named:
        """Optimisers work element by element: they get this process's rows as plain tensors in the same memory."""
        rows = {name: nn.Parameter(own_rows(weight)) for name, weight in weights.items()}
        self._pairs = [(weights[name], own) for name, own in rows.items()]
        return rows

    def sum_with_gradients(self, tensors: list[Tensor], parameters: Iterable[nn.Parameter]) -> None:
        """FSDP has added up the gradients already: they go to the rows that `own` has given."""
        for weight, own in self._pairs:
            if weight.grad is not None:
                own.grad, weight.grad = own_rows(weight.grad), None
        self.sum(tensors)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        squares = [parameter.grad.float().square().sum() for parameter in parameters if parameter.grad is not None]
        total = torch.stack(squares).sum()
        self.sum([total])
        norm = (total / self.copies).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    @contextmanager
    def watching(self) -> Iterator[None]:
        """FSDP's own exchanges fail with errors of torch where another process is gone."""
        try:
            yield
        except RuntimeError as error:
            if type(error) is not RuntimeError and not isinstance(error, dist.DistError):
                raise
            if "Connection" not in str(error) and not isinstance(error, dist.DistError):
                raise
            lost = self._reason() or Lost("its connection closed")
        else:
            return
        raise lost

    def _make_mesh(self, parts: int) -> DeviceMesh:
        kind, backend = ("cpu", "gloo") if self._device is None else ("cuda", "nccl")
        if self.copies == 1:
            return DeviceMesh.from_group(self._device or self._host, kind)
        ranks = torch.arange(self.size).view(self.copies, parts)
        groups = []
        for sets in (ranks.t().tolist(), ranks.tolist()):
            every = [dist.new_group(members, backend=backend, timeout=PATIENCE) for members in sets]
            self.inner += every
            groups += [group for group, members in zip(every, sets, strict=True) if self.rank in members]
        return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=("copies", "parts"))


def divided(processes: Group, model: PreTrainedModel, config: TRSPConfig) -> Group:
    """The processes as `run.parallel` has it for this model: `auto` divides it where a GPU cannot hold all of it.

    Raises:
        UserError: what the configuration asks for is not possible with divided weights.
    """
    if not isinstance(processes, Replicas) or processes.sharded:
        return processes
    size, free = needed(model, config), processes.lowest(free_memory(processes.device))
    fits = processes.device is None or size <= ROOM * free  # on a CPU, processes would share the memory anyway
    if config.run.parallel == "ddp" or (config.run.parallel == "auto" and fits):
        return processes
    _require_possible(config)
    return Shards(processes, parts_of(processes.size, local_size(processes), size, free))


def needed(model: PreTrainedModel, config: TRSPConfig) -> float:
    """Bytes that a whole copy holds all the time in the stage that holds most."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if not (config.transfer.passes or config.select.train_weights):
        return parameters * COMPUTE
    teacher = COMPUTE if config.transfer.imitates else 0
    return parameters * (2 * FP32 + STATE_BYTES[config.transfer.optimizer] + teacher)


def parts_of(size: int, local: int, needed: float, free: float) -> int:
    """How many processes hold one copy together: those of one node where they can, else all."""
    return local if 1 < local < size and size % local == 0 and needed / local <= ROOM * free else size


def local_size(processes: Replicas) -> int:
    """Processes of each node, where all have as many; else all of them, as if they were on one."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(processes.size)))
    highest, lowest = processes.highest(local, -local)
    return local if highest == -lowest else processes.size


def _require_possible(config: TRSPConfig) -> None:
    if config.transfer.fold == "alone":
        raise UserError(
            "transfer.fold is alone but with divided weights (run.parallel: fsdp) nothing can be folded; give "
            "transfer.fold=start with transfer.epochs above 0, or one process."
        )
    for name, given, wanted in (
        ("run.compile", config.run.compile, False),
        ("run.offload", config.run.offload, "none"),
        ("transfer.optimizer", config.transfer.optimizer, "adamw"),
    ):
        if given != wanted:
            raise UserError(
                f"{name} is {given} but divided weights (run.parallel: fsdp) need {wanted}; set {name}={wanted}."
            )
