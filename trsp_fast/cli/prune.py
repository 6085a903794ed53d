"""demo, prune and select: what decides which layers go and takes them out."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trsp_fast.cli.app import app
from trsp_fast.cli.common import config_values, events_for, load, print_answer, tokenizer_of, windows_of
from trsp_fast.cli.options import (
    AcceptChanges,
    ConfigFile,
    Data,
    Device,
    Dtype,
    EvalData,
    Json,
    Layers,
    Model,
    NumLayers,
    Out,
    Parallel,
    Preset,
    Ratio,
    RemoteCode,
    Restart,
    Resume,
    Revision,
    Seed,
    Settings,
    resolved,
)
from trsp_fast.errors import Interrupted, UserError


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the result; demo-pruned by default.")] = None,
    as_json: Json = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    preset: Preset = None,
    settings: Settings = None,
    parallel: Parallel = None,
) -> None:
    """Prune 3 of the 12 layers of the built-in model, start to report. An interrupted demo begins anew."""
    out = out or Path("demo-pruned")
    settings = ["num_layers=3", "data.samples=256", *(settings or []), *_parallel(parallel)]
    values = config_values(None, None, None, seed, preset, None, settings, device, dtype)
    demo_model = resolved("demo")
    try:
        _prune(demo_model, "demo", None, out, values, as_json, _Again(restart=True), title="the built-in demo model")
    except Interrupted as stop:
        raise Interrupted(stop.code, "interrupted; the next demo begins anew") from None


@app.command()
def prune(
    model: Model,
    out: Out,
    data: Data,
    ratio: Ratio = None,
    num_layers: NumLayers = None,
    layers: Layers = None,
    eval_data: EvalData = None,
    config: ConfigFile = None,
    settings: Settings = None,
    preset: Preset = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    allow_remote_code: RemoteCode = False,
    resume: Resume = False,
    restart: Restart = False,
    accept_changes: AcceptChanges = False,
    parallel: Parallel = None,
    as_json: Json = False,
) -> None:
    """Choose layers, move their knowledge out, remove them, prove the result and write it.

    Under torchrun the processes share the work: torchrun --nproc-per-node N -m trsp_fast prune ...
    """
    settings = [*(settings or []), *_parallel(parallel)]
    values = config_values(ratio, num_layers, layers, seed, preset, config, settings, device, dtype)
    if resume and restart:
        raise UserError("--resume and --restart were both given; they exclude each other, give one of them.")
    again = _Again(resume or accept_changes, restart, accept_changes)
    _prune(model, data, eval_data, out, values, as_json, again, revision=revision, remote_code=allow_remote_code)


@app.command()
def select(
    model: Model,
    data: Data,
    ratio: Ratio = None,
    num_layers: NumLayers = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="trsp (default), shortgpt, sleb, angular, shortened, last, first or random."),
    ] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    preset: Preset = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    allow_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Say which layers a method would remove."""
    from trsp_fast.config import TRSPConfig
    from trsp_fast.data import check_source
    from trsp_fast.select import choose_layers

    settings = [*(settings or []), *([f"select.method={method}"] if method else [])]
    values = config_values(ratio, num_layers, None, seed, preset, config, settings, device, dtype)
    chosen_config = TRSPConfig.from_dict(values)
    check_source(data)
    loaded = load(model, chosen_config, revision, allow_remote_code)
    tokens, _ = windows_of(loaded, model, data, None, chosen_config, revision, allow_remote_code)
    selection = choose_layers(loaded, tokens, chosen_config, events_for(as_json))
    layers = sorted(selection.layers)
    answer = {
        "method": chosen_config.select.method,
        "layers": layers,
        "order_of_choice": selection.layers,
        "window_forwards": selection.window_forwards,
    }
    print_answer(answer, as_json, f"{chosen_config.select.method} removes layers {', '.join(map(str, layers))}")


@dataclasses.dataclass(frozen=True)
class _Again:
    """What to do about an interrupted run of the same output; see trsp_fast.pruner.prune."""

    resume: bool = False
    restart: bool = False
    accept_changes: bool = False


def _prune(
    model: str,
    data: str,
    eval_data: str | None,
    out: Path,
    values: dict[str, Any],
    as_json: bool,
    again: "_Again",
    *,
    revision: str | None = None,
    remote_code: bool = False,
    title: str | None = None,
) -> None:
    from trsp_fast.config import TRSPConfig
    from trsp_fast.data import check_source
    from trsp_fast.engine.distributed import started
    from trsp_fast.models.checkpoint import predictors_not_loaded
    from trsp_fast.run.output import check_output

    config = TRSPConfig.from_dict(values)
    for source in (data, eval_data):
        check_source(source)
    about = {
        "model": title or model,
        "data": data,
        "evaluation_data": eval_data or f"the held-out part of {data}",
        "command": shlex.join(["trsp-fast", *sys.argv[1:]]),
    }
    with started(config) as group:
        silent = as_json or group.rank > 0
        if group.rank == 0:
            check_output(out, resume=again.resume)
        # A GPU may have no room for all of it: then it is divided on its way there
        device = "cpu" if group.size > 1 and config.run.parallel in ("auto", "fsdp") else None
        loaded = load(model, config, revision, remote_code, dtype="auto", device=device)
        tokens, evaluation = windows_of(loaded, model, data, eval_data, config, revision, remote_code)
        extras: dict[str, Any] = {"tokenizer": tokenizer_of(model, data, revision, remote_code), "about": about}
        extras |= {"evaluation": evaluation, "group": group, **dataclasses.asdict(again)}
        note = predictors_not_loaded(model, revision)
        report = _pruned(loaded, tokens, config, out, silent, extras, note)
    if group.rank == 0 and as_json:
        print(json.dumps({"out": str(out), **report}))
    elif group.rank == 0:
        from trsp_fast.report.terminal import print_result

        print_result(report, out)


def _pruned(
    loaded: Any, tokens: Any, config: Any, out: Path, silent: bool, extras: dict[str, Any], note: str | None
) -> dict[str, Any]:
    """The run itself, with what a person sees of it and the wish to end; its report."""
    from trsp_fast.pruner import prune as run
    from trsp_fast.run.state import Stop

    events = events_for(silent)
    if note:
        events.note(note)
    if len(tokens) < config.data.samples:
        events.note(
            f"the data has {len(tokens)} windows of {tokens.shape[1]} tokens, fewer than data.samples = "
            f"{config.data.samples}; all of them are used."
        )
    stop = Stop()
    stop.install()
    return run(loaded, tokens, config, out=out, events=events, stop=stop, **extras).report


def _parallel(option: str | None) -> list[str]:
    return [f"run.parallel={option}"] if option else []
