"""What an interrupted run goes on from: atomic, checksummed states, and when they are saved.

A state is two files: NUMBER.safetensors (tensors) and NUMBER.json (plain values, and the sha256 of both). The JSON is
renamed into place last, after both were flushed, so that a state is there whole or not at all. The two newest are kept:
where the newest is damaged, the one before it counts.
"""

import errno
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from trsp_fast.errors import Interrupted, UserError
from trsp_fast.run.output import flush_folder, write_durably

KEPT = 2  # states on disk: the newest, and the one before it in case the newest is damaged
Loaded = tuple[dict[str, Any], dict[str, Tensor]]  # plain values and tensors
AUTO_SHARE = 20  # without save_every, saving takes at most one part in so many of a run's time
DISK_RATE = 5e8  # bytes per second that saving is expected to write, until a state of that order was saved


@dataclass(frozen=True)
class State:
    """Plain values (JSON can say them) and tensors by name; `stage` and `step` say how far the run was."""

    stage: str
    step: int
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class StateStore:
    """The states of one run in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for path in (*folder.glob("*.partial"), *folder.glob("*.safetensors")):
            if path.is_file() and not path.with_suffix(".json").exists():  # a kill in the middle of `save` left it
                path.unlink()

    def save(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write a new state and drop all but the newest two.

        Raises:
            OSError: with ENOSPC where the disk is full; the states before are intact then.
        """
        number = self._next()
        path = self.folder / f"{number:06}.safetensors"
        digest = _write_tensors(tensors, path)
        text = json.dumps(values)
        envelope = {"tensors": digest, "values": hashlib.sha256(text.encode()).hexdigest(), "content": text}
        write_durably(path.with_suffix(".json"), json.dumps(envelope).encode())
        for old in self._numbers()[:-KEPT]:
            self._remove(old)

    def load(self) -> Loaded | None:
        """The newest state that is whole, None where there is none; damaged newer ones go, lest `save` keep them."""
        for number in reversed(self._numbers()):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                found = self._read(self.folder / f"{number:06}")
                break
        else:
            return None
        for damaged in self._numbers():
            if damaged > number:
                self._remove(damaged)
        return found

    @staticmethod
    def check(stem: Path) -> None:
        """Raise where a state's tensors are not those that its values were saved with."""
        if _digest(stem.with_suffix(".safetensors")) != _envelope(stem)["tensors"]:
            raise ValueError(f"{stem} is damaged")

    def _read(self, stem: Path) -> Loaded:
        """A state, put together where the weights were divided among processes."""
        from safetensors.torch import load_file

        from trsp_fast.run.divided_state import assembled, home

        values = read_values(stem)
        if "divided" not in values:
            self.check(stem)
            return values, load_file(stem.with_suffix(".safetensors"))
        processes = values["divided"]["processes"]
        for rank in range(processes):
            self.check(home(self.folder, rank) / stem.name)
        return assembled(self.folder, int(stem.name), processes)

    def _next(self) -> int:
        return max(self._numbers(), default=0) + 1

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if _is_number(path))

    def _remove(self, number: int) -> None:
        for suffix in (".json", ".safetensors"):
            with suppress(FileNotFoundError):
                (self.folder / f"{number:06}{suffix}").unlink()


def _is_number(path: Path) -> bool:
    return path.stem.isascii() and path.stem.isdigit() and path.is_file()


def read_values(stem: Path) -> dict[str, Any]:
    """The plain values of a state, known to be whole."""
    envelope = _envelope(stem)
    if hashlib.sha256(envelope["content"].encode()).hexdigest() != envelope["values"]:
        raise ValueError(f"{stem} is damaged")
    return json.loads(envelope["content"], object_hook=whole_keys)


def _envelope(stem: Path) -> dict[str, Any]:
    return json.loads(stem.with_suffix(".json").read_text())


def fitting(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The saved tensor of this name, which must fit where it is to go.

    Raises:
        UserError: it is missing or has another shape: the state is that of another configuration.
    """
    found = tensors.get(name)
    if found is None or found.shape != like.shape:
        has = "no" if found is None else f"{list(found.shape)} as"
        raise UserError(
            f"the state of the interrupted run has {has} {name}, this run needs {list(like.shape)}; give the "
            "configuration that it had, or --restart to begin anew."
        )
    return found


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> str:
    """A safetensors file that is there whole or not at all; its sha256."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        digest = _digest(partial)
        os.rename(partial, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, SafetensorError) and "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    flush_folder(path.parent)
    return digest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def whole_keys(values: dict[str, Any]) -> dict[Any, Any]:
    """JSON turns the layer numbers that are keys into text: turn them back."""
    return {int(key) if key.isdigit() else key: value for key, value in values.items()}


class Stop:
    """A wish to end. Outside of steps it ends the run where it is, inside the step is finished and saved first."""

    def __init__(self) -> None:
        self.code = 0  # what to exit with, 0 where nobody wants to end
        self._stepping = False

    def install(self) -> None:
        """Take SIGINT and SIGTERM; a second one ends at once."""
        signal.signal(signal.SIGINT, self._receive)
        signal.signal(signal.SIGTERM, self._receive)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False

    def _receive(self, number: int, _frame: object) -> None:
        code = 130 if number == signal.SIGINT else 143
        if self._stepping and not self.code:
            self.code = code
        elif code == 130:
            raise KeyboardInterrupt
        else:
            raise SystemExit(code)


class Keeper:
    """Keeps what a run has done, and ends it between two steps when asked to.

    Without a store nothing is kept and all methods still work, so that stages need not know.

    Args:
        store: where states go.
        every: save after so many steps; 0 saves as often as takes a twentieth of the time.
        stop: who may ask for the end.
        share: hands what the first of several processes has loaded to all of them; the others have no store, unless
            the weights are divided.
        highest: the highest of each number over the processes, so that all of them save and end after the same step.
    """

    def __init__(
        self,
        store: StateStore | None = None,
        every: int = 0,
        stop: Stop | None = None,
        *,
        share: Callable[[Loaded | None], Loaded | None] = lambda loaded: loaded,
        highest: Callable[..., list[int]] = lambda *numbers: list(numbers),
    ) -> None:
        self.store, self.every, self.stop, self._highest = store, every, stop or Stop(), highest
        self.facts: dict[str, Any] = {}  # what is known for good: perplexities, the chosen layers, ...
        self.base: dict[str, Tensor] = {}  # weights as stage 1 left them, where it trained them
        self._found: State | None = None
        self._since = time.monotonic()
        self._cost, self._bytes = 0.0, 0  # seconds and bytes of the last state
        self._steps = 0
        loaded = share(store.load() if store else None)
        self.resumes = loaded is not None
        if loaded:
            values, tensors = loaded
            self.facts = values["facts"]
            self.base = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("base.")}
            rest = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("stage.")}
            self._found = State(values["stage"], values["step"], values["values"], rest)

    def found(self, stage: str) -> State | None:
        """Where an interrupted run of `stage` was; asked once, since going on makes it old."""
        state = self._found
        if state is None or state.stage != stage:
            return None
        self._found = None
        return state

    def remember(self, name: str, value: Any) -> None:
        """Save a fact at the end of a stage."""
        self.facts[name] = value
        self._save(State(f"after {name}", 0))

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Around a stage's loop: a wish to end waits for `after_step` here."""
        with self.stop.stepping():
            yield

    def after_step(self, make: Callable[[], State], *, last: bool = False, size: int = 0) -> None:
        """Save if it is time; then end if that is wanted.

        Args:
            last: of a round or a stage. It is saved too, but where saving takes longer than doing the steps again.
            size: bytes of the stage's tensors, where they are many.

        Raises:
            Interrupted: after the state was saved.
        """
        self._steps += 1
        wish, time_to_save = self._highest(self.stop.code, int(self.store is not None and self._due(last, size)))
        if self.store and (time_to_save or wish):
            self._save(make())
        if wish:
            if self.store:
                raise Interrupted(wish)
            raise KeyboardInterrupt if wish == 130 else SystemExit(wish)

    def _due(self, last: bool, size: int) -> bool:
        if self.every:
            return last or self._steps >= self.every
        passed, cost = time.monotonic() - self._since, self._expected_cost(size)
        return passed > AUTO_SHARE * cost or (last and passed >= cost)

    def _expected_cost(self, size: int) -> float:
        """Seconds to save a state whose stage has tensors of `size` bytes."""
        size += sum(tensor.nbytes for tensor in self.base.values())
        if 2 * self._bytes >= size:
            return self._cost * min(1.0, size / self._bytes) if self._bytes and size else self._cost
        return size / DISK_RATE

    def discard(self) -> None:
        """Remove what is left of the states where the finished output is on another machine's disk."""
        if self.store:
            shutil.rmtree(self.store.folder, ignore_errors=True)

    def _save(self, state: State) -> None:
        if not self.store:
            return
        began = time.monotonic()
        tensors = {f"base.{name}": tensor for name, tensor in self.base.items()}
        tensors |= {f"stage.{name}": tensor for name, tensor in state.tensors.items()}
        values = {"stage": state.stage, "step": state.step, "values": state.values, "facts": self.facts}
        self.store.save(values, tensors)
        self._since = time.monotonic()
        self._cost, self._steps = self._since - began, 0
        self._bytes = sum(tensor.nbytes for tensor in tensors.values())
