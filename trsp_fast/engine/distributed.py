"""How the rows of a batch are spread over processes, and how what they find comes together."""

from typing import Any

from torch import Tensor


class Group:
    """One process that does everything; `torchrun` brings others."""

    rank, size = 0, 1

    def parts(self, rows: Tensor, micro_batch: int) -> list[tuple[Tensor, float]]:
        """This process's share of a batch's rows in micro-batches, each with its weight in the mean over all rows."""
        return [(part, len(part) / len(rows)) for part in rows.split(micro_batch or len(rows))]

    def sum(self, tensors: list[Tensor]) -> None:
        """Add up over the processes, in place."""

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of the batch."""
        return rows

    def agree(self, value: Any) -> Any:
        """What the first process has."""
        return value
