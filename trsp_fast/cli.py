"""The command line: arguments in, one sentence or a table out. Every command is a thin face of a public function.

Longer than other files because typer wants every option of every command spelled out in its signature.
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trsp_fast.errors import CheckFailed, Interrupted, Lost, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Take whole transformer layers out of language models, and prove the result.",
)

EVALUATION_WINDOWS = 128  # windows that prune and demo measure perplexity on; `eval` takes all


def _resolved(model: str) -> str:
    """`demo` is the built-in model; any other name is a folder or a hub name."""
    if model != "demo":
        return model
    folder = Path(__file__).parent / "demo_model"
    if not (folder / "config.json").exists():
        raise UserError(f"the built-in model is missing at {folder}; install the package again.")
    return str(folder)


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder or hub name of a causal language model, or demo.", callback=_resolved),
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the result: new or empty.")]
Data = Annotated[str, typer.Option("--data", help="demo, wikitext2, c4, ptb, alpaca or a path.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")]
RemoteCode = Annotated[bool, typer.Option("--allow-remote-code", help="Run code that the model brings along.")]
Layers = Annotated[str | None, typer.Option("--layers", help="Layers to remove, for example 3,6,9; skips stage 1.")]
Ratio = Annotated[str | None, typer.Option("--ratio", help="Share of the layers to remove, between 0 and 1.")]
NumLayers = Annotated[str | None, typer.Option("--num-layers", help="Number of layers to remove.")]
Seed = Annotated[str | None, typer.Option("--seed", help="Seed of every random choice.")]
Preset = Annotated[str | None, typer.Option("--preset", help="default, paper, authors-code or cut-first.")]
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
    values = _values(None, None, None, seed, preset, None, settings, device, dtype)
    demo_model = _resolved("demo")
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
    values = _values(ratio, num_layers, layers, seed, preset, config, settings, device, dtype)
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
        str | None, typer.Option("--method", help="trsp (default), shortgpt, sleb, last, first or random.")
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
    values = _values(ratio, num_layers, None, seed, preset, config, settings, device, dtype)
    chosen_config = TRSPConfig.from_dict(values)
    check_source(data)
    loaded = _load(model, chosen_config, revision, allow_remote_code)
    tokens, _ = _tokens(loaded, model, data, None, chosen_config, revision, allow_remote_code)
    selection = choose_layers(loaded, tokens, chosen_config, _events(as_json))
    layers = sorted(selection.layers)
    answer = {
        "method": chosen_config.select.method,
        "layers": layers,
        "order_of_choice": selection.layers,
        "window_forwards": selection.window_forwards,
    }
    _print(answer, as_json, f"{chosen_config.select.method} removes layers {', '.join(map(str, layers))}")


@app.command()
def plan(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub name, or demo.", callback=_resolved)
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

    values = _values(ratio, num_layers, layers, seed, preset, config, settings, device, dtype)
    amount = any(values.get(name) is not None for name in ("ratio", "num_layers", "layers"))
    chosen = TRSPConfig.from_dict(values if amount else merge(values, {"ratio": 0.5}))
    fields = read_config(_on_disk(checkpoint, revision, only="config.json"), remote_code=allow_remote_code)
    answer, lines = _removable(fields, chosen, amount)
    if data is not None:
        if not amount:
            raise UserError("--data was given without an amount; give --ratio, --num-layers or --layers too.")
        answer["forecast"], more = _forecast(checkpoint, data, eval_data, chosen, revision, allow_remote_code, as_json)
        lines += more
    _print(answer, as_json, "\n".join(lines))


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
    _say("note: probing a few steps of each stage", as_json)
    loaded = _load(model, config, revision, remote_code)
    tokens, evaluation = _tokens(loaded, model, data, eval_data, config, revision, remote_code)
    values = forecast(loaded, tokens, config, evaluation).to_dict()
    return values, forecast_lines(values)


@app.command()
def remove(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub name, or demo.", callback=_resolved)
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

    removed, folder = _layer_list(layers), _on_disk(checkpoint, revision)
    config = read_config(folder, remote_code=allow_remote_code)
    if obstacle := disk_obstacle(config):
        _say(f"note: {obstacle}, so the model is loaded and cut in memory.", as_json)
        _remove_in_memory(folder, removed, out, allow_remote_code, as_json)
        return
    with _byte_bar("removing layers", as_json) as progress:
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
    _print(answer, as_json, text)


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

    _quiet_transformers()
    with staged_output(out) as stage:
        model = load_model(folder, device="cpu", remote_code=remote_code)
        if note := predictors_not_loaded(folder):
            _say(f"note: {note}", as_json)
        try:
            tokenizer = load_tokenizer(folder, remote_code=remote_code)
        except UserError as error:
            tokenizer = None
            _say(f"note: {error}", as_json)
        small = remove_layers(model, removed)
        save_checkpoint(small, stage, tokenizer)
        checks = verify_checkpoint(small, stage)[0]
        if len({parameter.dtype for parameter in model.parameters()}) > 1:  # mixed ones do not run
            for each in (model, small):
                cast_parameters(each, torch.float32)
        checks += verify_removal(model, small, removed)
        require(checks)
        size = checkpoint_bytes(stage)
    answer = {"out": str(out), "removed_layers": sorted(removed), "bytes": size, "checks": _plain(checks)}
    _print(answer, as_json, f"{out}: {len(removed)} layers removed in memory, {size:,} bytes of weights, proven")


@app.command()
def verify(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="The unpruned one, or demo.", callback=_resolved)
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

    _quiet_transformers()
    layers, folder = _layer_list(removed), _on_disk(checkpoint, revision)
    if trained is None:
        report = Path(pruned) / "report.json"
        trained = read_json(report).get("trained") is True if report.exists() else False
    if streaming is None and (streaming := needs_streaming(folder, pruned)):
        _say("note: the two models may not fit into memory, so they are read layer by layer.", as_json)
    if not streaming:
        for name in (folder, pruned):
            load_model(name, device="cpu", remote_code=allow_remote_code)
    prove = verify_streamed if streaming else verify_checkpoints
    checks = prove(folder, pruned, layers, trained=trained, remote_code=allow_remote_code)
    if as_json:
        passed = all(check.passed for check in checks)
        print(json.dumps({"passed": passed, "streaming": bool(streaming), "checks": _plain(checks)}))
    else:
        _table(("check", "holds", "figure"), [(c.name, "yes" if c.passed else "NO", c.detail) for c in checks])
    require(checks)


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Data,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Window; min(2048, context) by default.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    allow_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a model: non-overlapping windows, token-weighted mean."""
    from trsp_fast.config import TRSPConfig
    from trsp_fast.data import check_source, check_vocabulary, evaluation_stream, evaluation_windows, window_length
    from trsp_fast.report.perplexity import perplexity

    config = TRSPConfig.from_dict({"dtype": dtype, "device": device, "data": {"seq_len": seq_len}})
    check_source(data)
    loaded = _load(model, config, revision, allow_remote_code)
    stream = evaluation_stream(data, _tokenizer(model, data, revision, allow_remote_code))
    if stream.dim() == 2 and not seq_len:
        seq_len = stream.shape[1]
    tokens = evaluation_windows(stream, window_length(loaded.config, seq_len))
    check_vocabulary(tokens, loaded.config.get_text_config(decoder=True).vocab_size)
    value = perplexity(loaded, tokens)
    finite = value if math.isfinite(value) else None  # JSON has no infinity
    answer = {"model": model, "data": data, "perplexity": finite, "tokens": tokens.numel(), "seq_len": tokens.shape[1]}
    _print(answer, as_json, f"perplexity {value:.4f} on {tokens.numel():,} tokens in windows of {tokens.shape[1]}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder written by prune or demo.")],
    as_json: Json = False,
) -> None:
    """Write DIR/report.html again from DIR/report.json."""
    import jinja2

    from trsp_fast.models.checkpoint import read_json
    from trsp_fast.report.html import headline, write_report

    path = folder / "report.json"
    if not path.exists():
        raise UserError(f"{str(path)!r} does not exist; give a folder written by trsp-fast prune or demo.")
    values = read_json(path)
    try:
        write_report(values, folder / "report.html")
    except (KeyError, jinja2.UndefinedError) as error:
        raise UserError(f"{str(path)!r} lacks {error}; give a folder written by trsp-fast prune or demo.") from None
    _print({"report": str(folder / "report.html")}, as_json, f"{headline(values)}\n{folder / 'report.html'}")


def main() -> None:
    """Run a command; the user's mistakes end as one sentence on stderr, never as a traceback."""
    _quiet_libraries()
    signal.signal(signal.SIGTERM, _terminate)
    code = 0
    try:
        code = app(standalone_mode=False) or 0  # typer turns Ctrl-C into the code 130
        if code == 130:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted; nothing was written.", 130)
    except Interrupted as error:
        code = _fail(f"{error}.", error.code)
    except SystemExit as stop:
        if stop.code != 143:
            raise
        code = _fail("interrupted; nothing was written.", 143)
    except UserError as error:
        code = _fail(str(error), 2)
    except (CheckFailed, Lost) as error:
        code = _fail(str(error), 1)
    except typer.Exit as error:
        code = error.exit_code
    except Exception as error:  # only typer's usage errors, whose class moves between its releases; defects go on
        if not hasattr(error, "format_message"):
            raise
        code = _fail(f"{error.format_message().rstrip('.')}; see trsp-fast --help.", 2)
    sys.exit(code)


def _terminate(*_arguments: object) -> None:
    """SIGTERM ends the run as Ctrl-C does, by an exception, so that nothing is left half-written."""
    sys.exit(143)


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
        device = "cpu" if group.size > 1 and config.run.parallel in ("auto", "fsdp") else config.device
        loaded = _load(model, config, revision, remote_code, dtype="auto", device=device)
        tokens, evaluation = _tokens(loaded, model, data, eval_data, config, revision, remote_code)
        extras: dict[str, Any] = {"tokenizer": _tokenizer(model, data, revision, remote_code), "about": about}
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

    events = _events(silent)
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


def _values(
    ratio: str | None,
    num_layers: str | None,
    layers: str | None,
    seed: str | None,
    preset: str | None,
    config: Path | None,
    settings: list[str] | None,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """The configuration's nested values; the more specific wins: file, then --set, then the options of their own."""
    from trsp_fast.config import merge, parse_setting, read_file

    numbers = {"ratio": ratio, "num_layers": num_layers, "seed": seed}
    options: dict[str, Any] = {name: _number(text) for name, text in numbers.items()} | {"preset": preset}
    options["layers"] = None if layers is None else tuple(_layer_list(layers))
    options |= {"device": None if device == "auto" else device, "dtype": None if dtype == "auto" else dtype}
    given = {name: value for name, value in options.items() if value is not None}
    from_file = read_file(config) if config else {}
    return merge(from_file, *(parse_setting(text) for text in settings or []), given)


def _number(text: str | None) -> float | int | str | None:
    """The number that a text says; other text stays what it is, for the configuration to refuse by its field's name."""
    for kind in (int, float):
        try:
            return None if text is None else kind(text)
        except ValueError:
            continue
    return text


def _layer_list(text: str | None) -> list[int]:
    if not text:
        raise UserError("no layers were named; give them as --layers 3,6,9.")
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"layers are {text!r}; give whole numbers with commas, for example 3,6,9.") from None


def _on_disk(checkpoint: str, revision: str | None, only: str | None = None) -> str:
    """The checkpoint's folder; one of the hub, or `only` a file of it, is fetched into the hub's cache first."""
    if Path(checkpoint).is_dir():
        return checkpoint
    import huggingface_hub

    try:
        return huggingface_hub.snapshot_download(checkpoint, revision=revision, allow_patterns=only)
    except Exception as error:  # the hub raises dozens of kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"checkpoint {checkpoint!r} is no folder and cannot be fetched ({reason}); give a folder or a hub name."
        ) from None


def _load(
    model: str,
    config: Any,
    revision: str | None,
    remote_code: bool,
    dtype: str | None = None,
    device: str | None = None,
) -> Any:
    """The model in the run's dtype and on its device, or in `dtype` and on `device`."""
    from trsp_fast.engine.precision import run_dtype
    from trsp_fast.models.checkpoint import load_model, resolve_device

    _quiet_transformers()
    wanted = dtype or str(run_dtype(config, resolve_device(config.device))).removeprefix("torch.")
    return load_model(model, dtype=wanted, device=device or config.device, revision=revision, remote_code=remote_code)


def _tokenizer(model: str, data: str, revision: str | None, remote_code: bool) -> Any:
    from trsp_fast.models.checkpoint import load_tokenizer

    try:
        return load_tokenizer(model, revision=revision, remote_code=remote_code)
    except UserError:
        if data.endswith(".safetensors"):
            return None
        raise


def _tokens(
    loaded: Any, model: str, data: str, eval_data: str | None, config: Any, revision: str | None, remote_code: bool
) -> tuple[Any, Any]:
    """Calibration and evaluation windows for a model."""
    from trsp_fast import data as sources

    streams = sources.load_streams(data, _tokenizer(model, eval_data or data, revision, remote_code), eval_data)
    wanted = config.data.seq_len
    if streams.calibration.dim() == 2 and not wanted:
        wanted = streams.calibration.shape[1]
    length = sources.window_length(loaded.config, wanted)
    tokens = sources.calibration_windows(streams.calibration, config.data.samples, length, config.seed)
    evaluation = None
    if len(streams.evaluation) and streams.evaluation.shape[-1] >= (length if streams.evaluation.dim() == 2 else 2):
        short = min(length, streams.evaluation.shape[-1])
        evaluation = sources.evaluation_windows(streams.evaluation, short, EVALUATION_WINDOWS)
        sources.check_vocabulary(evaluation, loaded.config.get_text_config(decoder=True).vocab_size)
    return tokens, evaluation


def _byte_bar(title: str, as_json: bool) -> Any:
    """A context that gives progress(done, total) in bytes: a bar on a terminal, nothing elsewhere."""
    if as_json or not sys.stderr.isatty():
        return contextlib.nullcontext()
    from trsp_fast.report.terminal import byte_bar

    return byte_bar(title)


def _events(as_json: bool) -> Any:
    from trsp_fast.report.terminal import progress_listener
    from trsp_fast.run.events import Events

    return Events() if as_json else Events(progress_listener())


def _quiet_libraries() -> None:
    """Other libraries' progress bars and advice do not belong into this tool's output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _quiet_transformers() -> None:
    """The same for transformers, once a command needs it."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _plain(checks: list[Any]) -> list[dict[str, Any]]:
    from dataclasses import asdict

    return [asdict(check) for check in checks]


def _print(answer: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(answer) if as_json else text)


def _say(text: str, as_json: bool) -> None:
    if not as_json:
        print(text, file=sys.stderr)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from trsp_fast.report.terminal import print_table

    print_table(head, rows)


def _fail(text: str, code: int) -> int:
    """Say why the run ends; of torchrun's processes the first one does, which hears what the others met."""
    if os.environ.get("RANK", "0") == "0":
        print(f"trsp-fast: {text}", file=sys.stderr)
    return code
