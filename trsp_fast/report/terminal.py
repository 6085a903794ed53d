"""What a person sees while a run goes and when it is done: bars on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from trsp_fast.report.html import figure_text, headline, size_text
from trsp_fast.run.events import Listener

_PERPLEXITIES = {
    "dense": "dense model",
    "cut": "layers cut, no stage 2",
    "transferred": "after stage 2, all layers on",
    "pruned": "TRSP result",
}


def progress_listener(only: Sequence[str] = ()) -> Listener:
    """Shows events: a bar with time left per stage on a terminal, a line per round or tenth of a stage elsewhere.

    Args:
        only: kinds of events that have a line, where not all that could.
    """
    console = Console()
    return _Bars(console, only) if console.is_terminal else _Lines(console, only)


@contextmanager
def byte_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with bytes done and bytes per second, moved by calls of (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def step_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with steps done and the time left, moved by calls of (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """One plain line for what matters; steps of stage 2 at every tenth."""

    def __init__(self, console: Console, only: Sequence[str] = ()) -> None:
        self.console, self.only = console, only

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        if self.only and kind not in self.only:
            return
        text = _sentence(kind, values)
        if kind == "transfer_step" and (values["step"] + 1) % max(1, values["steps"] // 10) == 0:
            text = f"stage 2: step {values['step'] + 1}/{values['steps']}, loss {values['loss']:.3f}"
        if text:
            self.console.print(text, highlight=False, soft_wrap=True)


class _Bars:
    """One bar per stage, removed when the stage is over; sentences stay above it."""

    def __init__(self, console: Console, only: Sequence[str] = ()) -> None:
        self.console, self.only = console, only
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.stage = ""
        self.tokens = 0  # of a step

    def __call__(self, kind: str, values: dict[str, Any]) -> None:
        if kind in ("phase", "selected", "perplexity", "checks", "end", "arm", "arm_done"):
            self._close()
        if kind == "plan":
            self.tokens = values["tokens"]
        if kind == "select_step":
            gates = [gate for gate in values["gates"] if gate is not None]
            note = f"round {values['round'] + 1} loss {values['loss']:.3f} gates {min(gates):.2f}-{max(gates):.2f}"
            self._advance("stage 1", note, values)
        if kind == "transfer_step":
            self._advance("stage 2", f"loss {values['loss']:.3f}", values)
        text = _sentence(kind, values) if not self.only or kind in self.only else None
        if text:
            self.console.print(text, highlight=False)

    def _advance(self, stage: str, note: str, values: dict[str, Any]) -> None:
        if self.progress is None or stage != self.stage:
            self._close()
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self.progress = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self.progress.start()
            self.task, self.stage = self.progress.add_task(stage, total=values["steps"], rate=""), stage
        assert self.task is not None
        speed = self.progress.tasks[0].speed  # steps per second
        self.progress.update(
            self.task,
            completed=values["step"] + 1,
            total=values["steps"],
            description=f"{stage} {note}",
            rate=f"{speed * self.tokens:,.0f} tokens/s" if speed else "",
        )

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
        self.progress, self.task = None, None


def _sentence(kind: str, values: dict[str, Any]) -> str | None:
    if kind == "note":
        return f"note: {values['text']}"
    if kind == "phase":
        texts = {"select": "stage 1: choosing layers", "transfer": "stage 2: moving their knowledge out"}
        return texts.get(values["name"], "measuring speed")
    if kind == "round":
        gate = f", gate {values['gate']:.4f}" if "gate" in values else ""
        return f"  round {values['round'] + 1}: layer {values['layer']}{gate}"
    if kind == "exchange" and values["layer"] != values["instead_of"]:
        return f"  now that the others are gone: layer {values['layer']} instead of {values['instead_of']}"
    if kind == "folded" and values["layers"]:
        last = values["layers"][-1]
        change = f"distance behind layer {last['layer']}: {last['before']:.3f} -> {last['after']:.3f}"
        return f"  folded into {len(values['layers'])} layers, {change}"
    if kind == "selected":
        return f"layers to remove: {', '.join(map(str, values['layers']))}"
    if kind == "perplexity":
        return f"perplexity, {_PERPLEXITIES[values['of']]}: {figure_text(values['value'])}"
    if kind == "resumed" and values.get("looking"):
        return "going on with the second look at the layers that stage 1 has chosen"
    if kind == "resumed":
        place = f"round {values['round'] + 1} of stage 1" if values["stage"] == "select" else "stage 2"
        return f"going on with step {values['step'] + 1}, {place}"
    if kind == "arm":
        left = values["seconds_left"]
        when = f", about {left / 60:.0f} minutes left" if left is not None else ""
        gone = f"{values['removed']} layers, " if values["removed"] else ""
        return f"{values['index'] + 1} of {values['arms']}{when}: {values['arm']}, {gone}seed {values['seed']}"
    if kind == "arm_done":
        return f"  perplexity {figure_text(values['perplexity'])} in {values['seconds']:.0f} s"
    if kind == "gates_discarded":
        return f"gates discarded: loss {values['loss_with_gates']:.3f} -> {values['loss_without_gates']:.3f}"
    return None


def _judged(entry: dict[str, Any]) -> str:
    """By the race that chose the layer; nothing where the gate did."""
    found = entry.get("judged", {}).get(str(entry["layer"]))
    return f"{found['loss']:.3f}, {found['windows']} windows" if isinstance(found, dict) else ""


def _chosen(rounds: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row a round; where the second look took a layer back, of the one that went for it."""
    looks = {entry["instead_of"]: entry for entry in rounds if "instead_of" in entry}
    rows: list[tuple[str, ...]] = []
    for entry in rounds:
        if "gate" in entry:
            layer, last = entry["layer"], looks.get(entry["layer"], entry)
            if last["layer"] == layer:
                rows.append((str(layer), figure_text(entry["gate"], 4), f"{entry['curvature']:.1e}", _judged(entry)))
            else:
                rows.append((f"{last['layer']}, for {layer} that came back", "-", "-", _judged(last)))
    return rows


def print_result(report: dict[str, Any], out: Path) -> None:
    """The run's table: layers and gates, perplexity, size, speed, proof, and where the checkpoint is."""
    rows = [(text, figure_text(report["perplexity"].get(name))) for name, text in _PERPLEXITIES.items()]
    console = Console()
    print_table(("perplexity", ""), [row for row in rows if row[1] != figure_text(None)])
    if chosen := _chosen(report["selection"]["rounds"]):
        print_table(("removed layer", "gate when chosen", "curvature", "loss without it"), chosen)
    speed, size = report["speed"], report["weight_bytes"]
    parameters = report["parameters"]
    print_table(
        ("", "before", "after"),
        [
            ("parameters", f"{parameters['dense']:,}", f"{parameters['pruned']:,}"),
            ("weights", size_text(size["dense"]), size_text(size["pruned"])),
            *(
                (text, figure_text(speed["dense"][key], 0), figure_text(speed["pruned"][key], 0))
                for key, text in (
                    ("prompt_tokens_per_second", "reading, tokens/s"),
                    ("generated_tokens_per_second", "generating, tokens/s"),
                )
                if speed
            ),
        ],
    )
    for check in report["checks"]:
        console.print(
            f"{'proven' if check['passed'] else 'FAILED'}: {check['name']} ({check['detail']})", highlight=False
        )
    console.print(f"\n{headline(report)}", highlight=False)
    console.print(f"checkpoint: {out}\nreport: {out / 'report.html'}", highlight=False, soft_wrap=True)


def forecast_lines(forecast: dict[str, Any]) -> list[str]:
    """What a run would take, for people; see trsp_fast.plan."""
    minutes = {name: f"{seconds / 60:.1f}" for name, seconds in forecast["seconds"].items()}
    lines = [
        f"{forecast['removed']} of {forecast['layers']} layers would go in about "
        f"{forecast['seconds_in_all'] / 60:.1f} minutes ({', '.join(f'{n} {m}' for n, m in minutes.items())})"
    ]
    for name, steps in forecast["steps"].items():
        if steps:
            parts = forecast["memory"].get(name, {})
            needed = ", ".join(f"{part} {size_text(size)}" for part, size in parts.items() if size)
            at_once = forecast["micro_batch"][name]
            lines.append(
                f"{name}: {steps:,} steps, {forecast['tokens'][name]:,} tokens, {at_once} windows in one pass, "
                f"{size_text(sum(parts.values()))} above the weights ({needed})"
            )
    disk = forecast["disk"]
    lines.append(
        f"weights {size_text(forecast['memory']['weights'])} in memory; checkpoint {size_text(disk['checkpoint'])}, "
        f"states meanwhile up to {size_text(disk['states'])} on disk"
    )
    return lines


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """As wide as its cells in a file or pipe; on a terminal cells are broken, never cut off."""
    table = Table(show_edge=False)
    for index, title in enumerate(head):
        table.add_column(title, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        needed = Measurement.get(console, console.options.update(width=10_000), table).maximum
        console.width = max(console.width, needed)
    console.print(table, "")
