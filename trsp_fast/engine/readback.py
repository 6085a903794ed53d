"""Figures of a step on their way to the host: read one step late, so that no step waits for the device."""

from collections.abc import Callable

import torch
from torch import Tensor

Figures = dict[str, Tensor]


class Readback:
    """Copies what a step has to say while the next step is already queued.

    On a GPU the copies go to pinned memory behind an event; `put` of the next step, or `flush`, waits for that event
    only and hands the values on. On the CPU they are plain copies, handed on at the same moments.
    """

    def __init__(self) -> None:
        self._waiting: tuple[torch.cuda.Event | None, Figures, Callable[[Figures], None]] | None = None

    def put(self, figures: Figures, use: Callable[[Figures], None]) -> None:
        """Send the figures of this step on their way, and use those of the step before."""
        host = {name: _host_copy(tensor) for name, tensor in figures.items()}
        event = None
        if any(tensor.is_cuda for tensor in figures.values()):
            event = torch.cuda.Event()
            event.record()
        self.flush()
        self._waiting = (event, host, use)

    def flush(self) -> None:
        """Use what is on its way, now."""
        if self._waiting is None:
            return
        event, host, use = self._waiting
        self._waiting = None
        if event is not None:
            event.synchronize()
        use(host)


def _host_copy(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return tensor.clone()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
