"""How the rows of a batch are spread over processes, and how what they find comes together.

Every process has the whole model (or rows of it: trsp_fast.engine.sharding). Each step it computes its share of the
batch, gradients are added up in one bucketed all-reduce, and all take the same optimiser step. Before a reduction the
processes agree on the host that all have got so far, so that nobody waits for one that ran out of memory; one that
fails says why before it goes.
"""

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.errors import CheckFailed, Diverged, Interrupted, Lost, UserError
from trsp_fast.run.state import Loaded, StateStore, whole_keys

BUCKET = 1 << 28  # bytes that are copied together for one all-reduce; larger tensors are reduced where they are
PATIENCE = timedelta(hours=1)  # how long processes wait for the first one, which alone proves, measures and writes

T = TypeVar("T")
Named = dict[str, nn.Parameter]


class Group:
    """One process that does everything; `torchrun` brings others."""

    rank, size = 0, 1
    sharded = False  # whether a process has rows of the weights only
    device: torch.device | None = None  # the GPU that torchrun's numbering gives this process

    def parts(self, rows: Tensor, micro_batch: int) -> list[tuple[Tensor, float]]:
        """This process's share of a batch's rows in micro-batches, each with its weight in the mean over all rows."""
        share = rows[self._place(len(rows))]
        if not len(share):
            return []
        return [(part, len(part) / len(rows)) for part in share.split(micro_batch or len(share))]

    def spread(self, own: Tensor, total: int) -> Tensor:
        """What this process found by row, at its place in the batch: `sum` makes all `total` rows of it."""
        whole = own.new_zeros(total, *own.shape[1:])
        whole[self._place(total)] = own
        return whole

    def sum(self, tensors: list[Tensor]) -> None:
        """Add up over the processes, in place."""

    def sum_with_gradients(self, tensors: list[Tensor], parameters: Iterable[nn.Parameter]) -> None:
        """Add up `tensors` and the gradients of `parameters`, those that at least one process has."""

    def agree(self, value: T) -> T:
        """What the first process has; plain values, and the others get tuples as lists."""
        return value

    def first(self, work: Callable[[], T]) -> T:
        """What the first process finds; plain values. The others wait."""
        return work()

    def highest(self, *numbers: int) -> list[int]:
        """The highest of each number over the processes."""
        return list(numbers)

    def share(self, found: Loaded | None) -> Loaded | None:
        """The state that the first process has loaded, for all: only its disk is read."""
        return found

    def store(self, folder: Path | None) -> StateStore | None:
        """Where this process keeps states, given the output's folder in the one that has it."""
        return StateStore(folder) if folder else None

    def own(self, weights: Named) -> Named:
        """The weights, by name, that this process's optimiser moves."""
        return weights

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """The norm of all gradients, which are scaled down to `limit` where it is larger."""
        return nn.utils.clip_grad_norm_(parameters, limit)

    def untouched(self, model: PreTrainedModel, trained: Named) -> PreTrainedModel:
        """A model that stays as it is: copies of the weights that will be trained, the others shared."""
        ids = {id(parameter) for parameter in trained.values()}
        shared = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in ids}
        return copy.deepcopy(model, shared).eval().requires_grad_(False)

    def whole(self, tensor: Tensor) -> Tensor:
        """A weight in one piece."""
        return tensor.detach()

    def watching(self) -> AbstractContextManager:
        """Inside, what fails because another process is gone says so."""
        return nullcontext()

    def _place(self, total: int) -> slice:
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)


class Replicas(Group):
    """Processes with a whole model each.

    Values on the host go through a gloo group; tensors on a GPU through an NCCL one.
    """

    def __init__(self, host: dist.ProcessGroup, device: dist.ProcessGroup | None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._host, self._device = host, device
        self.device = None if device is None else torch.device("cuda", torch.cuda.current_device())
        self._store = dist.distributed_c10d._get_default_store()
        self._key = f"trsp_fast/{host.group_name}/failure"
        self.inner: list[dist.ProcessGroup] = []  # others that end with this one

    def sum(self, tensors: list[Tensor]) -> None:
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                self._reduce(bucket[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            self._reduce(flat)
            for tensor, piece in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(piece.view_as(tensor))

    def sum_with_gradients(self, tensors: list[Tensor], parameters: Iterable[nn.Parameter]) -> None:
        """A process without rows, or whose rows reached no expert of some kind, brings zeros."""
        parameters = list(parameters)
        anywhere = self.highest(*(int(parameter.grad is not None) for parameter in parameters)) if parameters else []
        chosen = [parameter for parameter, there in zip(parameters, anywhere, strict=True) if there]
        for parameter in chosen:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum([*tensors, *(parameter.grad for parameter in chosen if parameter.grad is not None)])

    def agree(self, value: T) -> T:
        text = json.dumps(value).encode() if self.rank == 0 else b""
        (length,) = self.highest(len(text))
        content = torch.frombuffer(bytearray(text or bytes(length)), dtype=torch.uint8)
        self._broadcast(content)
        return value if self.rank == 0 else json.loads(content.numpy().tobytes(), object_hook=whole_keys)

    def first(self, work: Callable[[], Any]) -> Any:
        return self.agree(work() if self.rank == 0 else None)

    def highest(self, *numbers: int) -> list[int]:
        tensor = torch.tensor(numbers, dtype=torch.int64)
        self._try(lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._host))
        return tensor.tolist()

    def lowest(self, number: float) -> int:
        return -self.highest(-int(number))[0]

    def share(self, found: Loaded | None) -> Loaded | None:
        values, tensors = found or (None, {})
        shapes: Any = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
        both: Any = self.agree([values, shapes])
        values, shapes = both
        for name, dtype, shape in shapes:
            if self.rank:
                tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            if tensors[name].numel():
                self._broadcast(tensors[name].view(-1).view(torch.uint8))
        return None if values is None else (values, tensors)

    def fail(self, error: BaseException) -> BaseException:
        """Leave a reason for the others, who notice when the connections close; the error to end with.

        Where this process was told to end because another one had failed, that one's reason counts.
        """
        reason = self._reason() if isinstance(error, _WISHES) else None
        if reason and not isinstance(reason, _WISHES):
            return reason
        with suppress(RuntimeError):  # the store may be gone with its process
            self._store.set(self._key, json.dumps(_told(error, self.rank)))
        return error

    def close(self) -> None:
        for group in [*self.inner, self._host]:
            with suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group(group)

    def _reduce(self, tensor: Tensor) -> None:
        group = self._device if tensor.is_cuda else self._host
        self._try(lambda: dist.all_reduce(tensor, group=group))

    def _broadcast(self, content: Tensor) -> None:
        self._try(lambda: dist.broadcast(content, group_src=0, group=self._host))

    def _try(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange()
        except RuntimeError as error:
            problem = "its connection closed" if "Connection" in str(error) else str(error)
        else:
            return
        raise self._reason() or Lost(problem)

    def _reason(self) -> BaseException | None:
        """What another process left before it went; None where it was killed."""
        with suppress(RuntimeError):
            if self._store.check([self._key]):
                return _heard(json.loads(self._store.get(self._key)))
        return None


@contextmanager
def started(config: TRSPConfig) -> Iterator[Group]:
    """The processes that torchrun has started, as `run.parallel` has it; this process alone without torchrun.

    A process group that is there already is used and stays.

    Raises:
        UserError: `ddp` or `fsdp` without torchrun, or a device that several processes would share.
        Lost: inside, another process is gone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if config.run.parallel in ("ddp", "fsdp") and size == 1 and "RANK" not in os.environ:
        raise UserError(
            f"run.parallel is {config.run.parallel} but torchrun has started no processes; give the command as "
            "torchrun --nproc-per-node N -m trsp_fast ..., or leave run.parallel at auto."
        )
    if config.run.parallel == "none" or size == 1:
        yield Group()
        return
    on_gpu = _take_gpu(config.device)
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", timeout=PATIENCE)
    host = dist.new_group(backend="gloo", timeout=PATIENCE)
    group = Replicas(host, dist.new_group(backend="nccl", timeout=PATIENCE) if on_gpu else None)
    del host  # the connections close with the last reference
    try:
        yield group
    except BaseException as error:
        reason = group.fail(error)
        group.close()
        if reason is error:
            raise
        raise reason from None
    group.close()
    if own:
        dist.destroy_process_group()


def _take_gpu(device: str) -> bool:
    """Whether this process computes on a GPU, which is then its own one."""
    if device == "cpu" or not torch.cuda.is_available():
        return False
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device not in ("auto", "cuda"):
        raise UserError(f"device is {device!r} but torchrun has started several processes; give auto, cuda or cpu.")
    if local >= torch.cuda.device_count():
        raise UserError(
            f"torchrun has started at least {local + 1} processes here but there are {torch.cuda.device_count()} GPUs; "
            "give it --nproc-per-node gpu."
        )
    torch.cuda.set_device(local)
    return True


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors by dtype and device in groups of at most BUCKET bytes, or of one larger tensor."""
    open_ones: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        bucket = open_ones.get(kind, [])
        if bucket and sum(map(_bytes, bucket)) + _bytes(tensor) > BUCKET:
            yield bucket
            bucket = []
        open_ones[kind] = [*bucket, tensor]
    yield from open_ones.values()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


_WISHES = (KeyboardInterrupt, SystemExit, Interrupted)
_KINDS: dict[str, type[BaseException]] = {
    kind.__name__: kind for kind in (UserError, CheckFailed, Diverged, Lost, *_WISHES)
}


def _told(error: BaseException, rank: int) -> dict[str, Any]:
    """An error as the other processes get it; a defect, whose own traceback says more, is a lost process to them."""
    kind = type(error).__name__
    if kind not in _KINDS:
        return {"kind": "Lost", "argument": f"process {rank} failed with {kind}: {error}"}
    if isinstance(error, Interrupted | SystemExit):
        return {"kind": kind, "argument": error.code}
    text = error.problem if isinstance(error, Lost) else str(error)
    return {"kind": kind, "argument": f"process {rank}: {text}" if kind == "UserError" and rank else text}


def _heard(told: dict[str, Any]) -> BaseException:
    return _KINDS[told["kind"]](told["argument"])
