"""States of a run whose weights are divided: every process writes its own rows, any number of processes reads them.

The first process's files are where a state of one process is; those of process N in the folder `processN` beside them.
The values say which rows of which tensors a file has, so that they can be cut anew.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trsp_fast.errors import UserError
from trsp_fast.run.state import Loaded, StateStore, read_values

Rows = tuple[int, int, int]  # the first row, how many, and of how many in all


@dataclass(frozen=True)
class Part:
    """One process of several: its number, theirs, and its rows of each weight by name.

    highest: the highest of some numbers over the processes. agree: what the first process has.
    """

    rank: int
    size: int
    rows: dict[str, Rows]
    highest: Callable[..., list[int]]
    agree: Callable[[Any], Any]

    def rows_of(self, name: str) -> Rows | None:
        """This process's rows of a tensor of the state, which is named after its weight; None where it has all."""
        words = name.partition("/")[0].split(".")
        return next((self.rows[key] for i in range(len(words)) if (key := ".".join(words[i:])) in self.rows), None)


class DividedStore(StateStore):
    """A process's part of the states in `folder`, which all processes see."""

    def __init__(self, folder: Path, part: Part) -> None:
        super().__init__(home(folder, part.rank))
        self.shared, self.part = folder, part

    def save(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        found = {name: self.part.rows_of(name) for name, tensor in tensors.items() if tensor.dim()}
        rows = {name: list(place) for name, place in found.items() if place}
        super().save({**values, "divided": {"processes": self.part.size, "rows": rows}}, tensors)

    def load(self) -> Loaded | None:
        """The newest state of which all parts are whole; what is newer goes."""
        part = self.part
        newest = part.agree(self._newest_of_all() if part.rank == 0 else None)
        if newest is None:
            return None
        number, processes = newest
        try:
            values, tensors = assembled(self.shared, number, processes, part.rows_of)
        except FileNotFoundError as error:
            raise UserError(
                f"process {part.rank} does not see {error.filename!r}; put --out on a disk that all machines share."
            ) from None
        for damaged in self._numbers():
            if damaged > number:
                self._remove(damaged)
        part.highest(0)  # nobody writes before all have read
        return values, tensors

    def _newest_of_all(self) -> tuple[int, int] | None:
        for number in reversed(self._numbers()):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                processes = _processes(read_values(self.folder / f"{number:06}"))
                for rank in range(processes):
                    stem = home(self.shared, rank) / f"{number:06}"
                    if _processes(read_values(stem)) != processes:
                        raise ValueError(f"{stem} is of another state")
                    StateStore.check(stem)
                return number, processes
        return None

    def _next(self) -> int:
        """One number for all, above every one that any process has."""
        return self.part.highest(super()._next())[0]


def home(folder: Path, rank: int) -> Path:
    return folder / f"process{rank}" if rank else folder


def assembled(
    folder: Path, number: int, processes: int, rows_of: Callable[[str], Rows | None] = lambda _name: None
) -> Loaded:
    """The first process's values, and of every tensor the rows that `rows_of` names, all by default."""
    from safetensors import safe_open

    stems = [home(folder, rank) / f"{number:06}" for rank in range(processes)]
    values = [read_values(stem) for stem in stems]
    tensors: dict[str, Tensor] = {}
    for stem, theirs in zip(stems, values, strict=True):
        divided = theirs.get("divided", {"rows": {}})["rows"]
        with safe_open(stem.with_suffix(".safetensors"), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                stored = file.get_slice(name)
                shape = stored.get_shape()
                if not shape:
                    tensors.setdefault(name, file.get_tensor(name))
                    continue
                first, count, total = divided.get(name) or (0, shape[0], shape[0])
                begin, wanted, _ = rows_of(name) or (0, total, total)
                low, high = max(first, begin), min(first + count, begin + wanted)
                if name not in tensors:
                    tensors[name] = file.get_tensor(name).new_empty(wanted, *shape[1:])
                if low < high:
                    tensors[name][low - begin : high - begin] = stored[low - first : high - first]
    return {key: value for key, value in values[0].items() if key != "divided"}, tensors


def _processes(values: dict[str, Any]) -> int:
    """How many parts a state has: one where the weights were whole."""
    return int(values["divided"]["processes"]) if "divided" in values else 1
