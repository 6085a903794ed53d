"""plan, remove and verify: what is done with checkpoints as they are, without training."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from trsp_fast.cli.app import app
from trsp_fast.cli.common import (
    byte_bar,
    config_values,
    layer_list,
    load,
    on_disk,
    plain,
    print_answer,
    quiet_transformers,
    say,
    table,
    windows_of,
)
from trsp_fast.cli.options import (
    ConfigFile,
    Device,
    Dtype,
    EvalData,
    Json,
    Layers,
    NumLayers,
    Out,
    Preset,
    Ratio,
    RemoteCode,
    Revision,
    Seed,
    Settings,
    resolved,
)
from trsp_fast.errors import UserError


@app.command()
def plan(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub name, or demo.", callback=resolved)
    ],
    ratio: Ratio = None,
    num_layers: NumLayers = None,
    layers: Layers = None,
    data: Annotated[str | None, typer.Option("--data", help="Probe a run on this, with an amount to remove.")] = None,
    eval_data: EvalData = None,
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
    """Say which layers can be taken out and why others cannot; with --data, what a run would take."""
    from trsp_fast.config import TRSPConfig, merge
    from trsp_fast.models.checkpoint_files import read_config

    values = config_values(ratio, num_layers, layers, seed, preset, config, settings, device, dtype)
    amount = any(values.get(name) is not None for name in ("ratio", "num_layers", "layers"))
    chosen = TRSPConfig.from_dict(values if amount else merge(values, {"ratio": 0.5}))
    fields = read_config(on_disk(checkpoint, revision, only="config.json"), remote_code=allow_remote_code)
    answer, lines = _removable(fields, chosen, amount)
    if data is not None:
        if not amount:
            raise UserError("--data was given without an amount; give --ratio, --num-layers or --layers too.")
        answer["forecast"], more = _forecast(checkpoint, data, eval_data, chosen, revision, allow_remote_code, as_json)
        lines += more
    print_answer(answer, as_json, "\n".join(lines))


def _removable(fields: dict[str, Any], config: Any, amount: bool) -> tuple[dict[str, Any], list[str]]:
    """What the configuration says: which layers can go, and whether those that are named can go together."""
    from trsp_fast.config import checked_layers
    from trsp_fast.models.families import check_set, disk_obstacle, fixed_layers, layer_count, text_fields

    _, count = layer_count(text_fields(fields))
    select = config.select
    protected = [*range(select.protect_first), *range(count - select.protect_last, count)]
    kept = dict.fromkeys(protected, "protected by the settings.") | fixed_layers(fields)
    removed = checked_layers(config.layers, count) if config.layers else []
    if removed:
        check_set(fields, removed)
    wanted = config.layer_count(count) if amount else 0
    if not removed and wanted > count - len(kept):
        raise UserError(f"{wanted} layers are to go, but only {count - len(kept)} of {count} can; remove fewer.")
    obstacle = disk_obstacle(fields)
    where = f"in memory, because {obstacle}" if obstacle else "on disk or in memory"
    removable = [layer for layer in range(count) if layer not in kept]
    answer: dict[str, Any] = {"layers": count, "removable": removable, "kept": kept, "removed": removed}
    lines = [f"{len(removable)} of {count} layers can be taken out one by one, {where}"]
    lines += [f"layer {layer} stays: {reason}" for layer, reason in sorted(kept.items())]
    if removed:
        lines.append(f"layers {', '.join(map(str, removed))} can go together, {count - len(removed)} stay")
    return answer, lines


def _forecast(
    model: str,
    data: str,
    eval_data: str | None,
    config: Any,
    revision: str | None,
    remote_code: bool,
    as_json: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Load the model, do a little of the run, and say what all of it would take."""
    from trsp_fast.data import check_source
    from trsp_fast.plan import forecast
    from trsp_fast.report.terminal import forecast_lines

    for source in (data, eval_data):
        check_source(source)
    say("note: probing a few steps of each stage", as_json)
    loaded = load(model, config, revision, remote_code)
    tokens, evaluation = windows_of(loaded, model, data, eval_data, config, revision, remote_code)
    values = forecast(loaded, tokens, config, evaluation).to_dict()
    return values, forecast_lines(values)


@app.command()
def remove(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub name, or demo.", callback=resolved)
    ],
    out: Out,
    layers: Layers = None,
    revision: Revision = None,
    allow_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Remove layers from a checkpoint on disk: nothing is loaded and, where the file system can, nothing copied."""
    from trsp_fast.models.checkpoint_files import read_config
    from trsp_fast.models.disk_removal import remove_layers_on_disk
    from trsp_fast.models.families import disk_obstacle
    from trsp_fast.models.tensor_names import dropped_predictors

    removed, folder = layer_list(layers), on_disk(checkpoint, revision)
    config = read_config(folder, remote_code=allow_remote_code)
    if obstacle := disk_obstacle(config):
        say(f"note: {obstacle}, so the model is loaded and cut in memory.", as_json)
        _remove_in_memory(folder, removed, out, allow_remote_code, as_json)
        return
    with byte_bar("removing layers", as_json) as progress:
        done = remove_layers_on_disk(folder, removed, out, progress=progress)
    rate = (done.shared + done.copied) / max(done.seconds, 1e-9) / 1e6
    text = (
        f"{out}: {len(done.removed)} layers removed, {done.layers} left; {done.shared:,} bytes shared, "
        f"{done.copied:,} copied in {done.seconds:.2f} s ({rate:,.0f} MB/s)"
    )
    if done.left_out:
        text += f"\nleft out, other forms of the weights, reports or hidden: {', '.join(done.left_out)}"
    if done.predicting:
        text += f"\n{dropped_predictors(len(done.predicting))}"
    answer = dataclasses.asdict(done) | {"out": str(out), "removed_layers": done.removed}
    print_answer(answer, as_json, text)


def _remove_in_memory(folder: str, removed: list[int], out: Path, remote_code: bool, as_json: bool) -> None:
    """The way of models that the files alone do not describe: load, rebuild, prove, save."""
    import torch

    from trsp_fast.engine.precision import cast_parameters
    from trsp_fast.models.checkpoint import (
        checkpoint_bytes,
        load_model,
        load_tokenizer,
        predictors_not_loaded,
        save_checkpoint,
    )
    from trsp_fast.models.removal import remove_layers
    from trsp_fast.models.verify import require, verify_checkpoint, verify_removal
    from trsp_fast.run.output import staged_output

    quiet_transformers()
    with staged_output(out) as stage:
        model = load_model(folder, device="cpu", remote_code=remote_code)
        if note := predictors_not_loaded(folder):
            say(f"note: {note}", as_json)
        try:
            tokenizer = load_tokenizer(folder, remote_code=remote_code)
        except UserError as error:
            tokenizer = None
            say(f"note: {error}", as_json)
        small = remove_layers(model, removed)
        save_checkpoint(small, stage, tokenizer)
        checks = verify_checkpoint(small, stage)[0]
        if len({parameter.dtype for parameter in model.parameters()}) > 1:  # mixed ones do not run
            for each in (model, small):
                cast_parameters(each, torch.float32)
        checks += verify_removal(model, small, removed)
        require(checks)
        size = checkpoint_bytes(stage)
    answer = {"out": str(out), "removed_layers": sorted(removed), "bytes": size, "checks": plain(checks)}
    print_answer(answer, as_json, f"{out}: {len(removed)} layers removed in memory, {size:,} bytes of weights, proven")


@app.command()
def verify(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="The unpruned one, or demo.", callback=resolved)
    ],
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="The pruned checkpoint.")],
    removed: Annotated[str, typer.Option("--removed", help="The layers that were removed, for example 3,6,9.")],
    trained: Annotated[
        bool | None, typer.Option("--trained/--untrained", help="Whether weights were trained; asked of report.json.")
    ] = None,
    streaming: Annotated[
        bool | None,
        typer.Option("--streaming/--in-memory", help="Layer by layer from the files; by default if memory is short."),
    ] = None,
    revision: Revision = None,
    allow_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Prove that PRUNED is CHECKPOINT without the removed layers: exit 0, or 1."""
    from trsp_fast.models.checkpoint import load_model, read_json
    from trsp_fast.models.streamed_verify import needs_streaming, verify_streamed
    from trsp_fast.models.verify import require, verify_checkpoints

    quiet_transformers()
    layers, folder = layer_list(removed), on_disk(checkpoint, revision)
    report = Path(pruned) / "report.json"
    told = read_json(report) if report.exists() else {}
    trained = told.get("trained") is True if trained is None else trained
    try:
        folded = {int(entry["layer"]): str(entry["projection"]) for entry in told.get("fold", [])}
    except (TypeError, KeyError, ValueError, AttributeError):
        raise UserError(f"{str(report)!r} holds no list of folds under fold; give --trained without it.") from None
    if streaming is None and (streaming := needs_streaming(folder, pruned)):
        say("note: the two models may not fit into memory, so they are read layer by layer.", as_json)
    if not streaming:
        for name in (folder, pruned):
            load_model(name, device="cpu", remote_code=allow_remote_code)
    prove = verify_streamed if streaming else verify_checkpoints
    checks = prove(folder, pruned, layers, trained=trained, folded=folded, remote_code=allow_remote_code)
    if as_json:
        passed = all(check.passed for check in checks)
        print(json.dumps({"passed": passed, "streaming": bool(streaming), "checks": plain(checks)}))
    else:
        table(("check", "holds", "figure"), [(c.name, "yes" if c.passed else "NO", c.detail) for c in checks])
    require(checks)
