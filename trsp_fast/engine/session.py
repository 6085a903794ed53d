"""What a run hands to its stages: who listens, what is kept, in which pieces a batch is computed, by how many."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trsp_fast.engine.distributed import Group
from trsp_fast.errors import UserError
from trsp_fast.run.events import Events
from trsp_fast.run.state import Keeper


@dataclass
class Session:
    """Everything of a run that is not its model, its tokens and its configuration.

    micro_batch: windows in one forward pass; 0 is the whole batch. Losses and gradients do not depend on it but by
        rounding, since a micro-batch holds whole windows and weighs as much as it has.
    """

    events: Events = field(default_factory=Events)
    keeper: Keeper = field(default_factory=Keeper)
    group: Group = field(default_factory=Group)
    micro_batch: int = 0

    def accumulate(self, rows: Tensor, work: Callable[[Tensor, float], None], begin: Callable[[], None]) -> None:
        """Call `work(rows, weight)` for each micro-batch of a batch's rows, after `begin()`.

        Where memory runs out, in any process, the micro-batch is halved in all, once and for all, and the batch begins
        anew.

        Raises:
            UserError: there is no memory for a single window.
        """
        while True:
            begin()
            parts, failed = self.group.parts(rows, self.micro_batch), 0
            try:
                for part, weight in parts:
                    work(part, weight)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                failed = len(parts[0][0])
            # outside of the handler, which holds on to the tensors of the failed pass
            (size,) = self.group.highest(failed)
            if not size:
                return
            self._halve(size)

    def _halve(self, size: int) -> None:
        if size == 1:
            raise UserError(
                "there is not enough memory for one window; set data.seq_len lower, or use a device with more."
            )
        self.micro_batch = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.events.note(
            f"memory ran out with {size} windows in one pass; {self.micro_batch} at a time from here on, which changes "
            "results by rounding only."
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
