"""One stream of events per run: who produces them does not know who listens (progress bars, events.jsonl, tests)."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# kind ("round", "step", "note", ...) and its plain values
Listener = Callable[[str, dict[str, Any]], None]


class Events:
    """Passes each event to every listener, in order."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = list(listeners)

    def emit(self, kind: str, **values: Any) -> None:
        for listener in self.listeners:
            listener(kind, values)

    def note(self, text: str) -> None:
        """Something the user should know, one sentence."""
        self.emit("note", text=text)


class JsonLines:
    """Listener that appends each event to a file, one JSON object a line with a wall-clock `time` in seconds."""

    def __init__(self, path: Path) -> None:
        _drop_torn_line(path)
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        self.file.write(json.dumps({"time": round(time.time(), 3), "event": kind, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Listener that writes losses, gates and distances as curves, for `tensorboard --logdir`.

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        if kind not in ("select_step", "transfer_step"):
            return
        stage, step = kind.removesuffix("_step"), values["step"] + values.get("round", 0) * values["steps"]
        for name in ("loss", "lm_loss", "penalty", "gradient_norm", "lr", "gate", "lambda2"):
            if name in values:
                self.writer.add_scalar(f"{stage}/{name}", values[name], step)
        for name in ("gates", "gradients", "D"):
            by_layer = values.get(name) or {}
            layers = by_layer.items() if isinstance(by_layer, dict) else enumerate(by_layer)
            for layer, value in layers:
                if value is not None:
                    self.writer.add_scalar(f"{stage}/{name}/layer {layer}", value, step)

    def close(self) -> None:
        self.writer.close()


def _drop_torn_line(path: Path) -> None:
    """A process that was killed may have left half a line at the end."""
    if path.exists():
        whole = path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            with path.open("r+b") as file:
                file.truncate(end)
