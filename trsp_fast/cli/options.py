"""The options that several commands share, and what resolves them."""

from pathlib import Path
from typing import Annotated

import typer

from trsp_fast.errors import UserError


def resolved(model: str) -> str:
    """`demo` is the built-in model; any other name is a folder or a hub name."""
    if model != "demo":
        return model
    folder = Path(__file__).parents[1] / "demo_model"
    if not (folder / "config.json").exists():
        raise UserError(f"the built-in model is missing at {folder}; install the package again.")
    return str(folder)


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder or hub name of a causal language model, or demo.", callback=resolved),
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the result: new or empty.")]
Data = Annotated[str, typer.Option("--data", help="demo, wikitext2, c4, ptb, alpaca or a path.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Tasks of lm-eval, for example piqa,arc_easy.")]
Limit = Annotated[int | None, typer.Option("--limit", help="So many examples of each task, for a first look.")]
TaskPath = Annotated[Path | None, typer.Option("--task-path", help="Folder with task definitions of your own.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")]
RemoteCode = Annotated[bool, typer.Option("--allow-remote-code", help="Run code that the model brings along.")]
Layers = Annotated[str | None, typer.Option("--layers", help="Layers to remove, for example 3,6,9; skips stage 1.")]
Ratio = Annotated[str | None, typer.Option("--ratio", help="Share of the layers to remove, between 0 and 1.")]
NumLayers = Annotated[str | None, typer.Option("--num-layers", help="Number of layers to remove.")]
Seed = Annotated[str | None, typer.Option("--seed", help="Seed of every random choice.")]
Preset = Annotated[str | None, typer.Option("--preset", help="default, paper, authors-code, two-stage or cut-first.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML or JSON file with fields of the configuration.")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="One field, for example transfer.norm=l1; repeatable.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of --out.")]
Restart = Annotated[bool, typer.Option("--restart", help="Discard an interrupted run of --out.")]
AcceptChanges = Annotated[
    bool, typer.Option("--accept-changes", help="Resume although data, settings or versions differ.")
]
Parallel = Annotated[
    str | None, typer.Option("--parallel", help="auto, ddp, fsdp or none: what torchrun's processes do together.")
]
EvalData = Annotated[str | None, typer.Option("--eval-data", help="Evaluate on this instead of a part of --data.")]
