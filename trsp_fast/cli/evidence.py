"""eval, compare and report: how good a model is, and a way of pruning."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trsp_fast.cli.app import app
from trsp_fast.cli.common import (
    EVALUATION_WINDOWS,
    config_values,
    load,
    number_list,
    print_answer,
    table,
    tokenizer_of,
)
from trsp_fast.cli.options import (
    ConfigFile,
    Data,
    Device,
    Dtype,
    Json,
    Model,
    Preset,
    RemoteCode,
    Restart,
    Resume,
    Revision,
    Settings,
    resolved,
)
from trsp_fast.errors import UserError


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
    loaded = load(model, config, revision, allow_remote_code)
    stream = evaluation_stream(data, tokenizer_of(model, data, revision, allow_remote_code))
    if stream.dim() == 2 and not seq_len:
        seq_len = stream.shape[1]
    tokens = evaluation_windows(stream, window_length(loaded.config, seq_len))
    check_vocabulary(tokens, loaded.config.get_text_config(decoder=True).vocab_size)
    value = perplexity(loaded, tokens)
    finite = value if math.isfinite(value) else None  # JSON has no infinity
    answer = {"model": model, "data": data, "perplexity": finite, "tokens": tokens.numel(), "seq_len": tokens.shape[1]}
    print_answer(
        answer, as_json, f"perplexity {value:.4f} on {tokens.numel():,} tokens in windows of {tokens.shape[1]}"
    )


@app.command()
def compare(
    model: Model,
    data: Annotated[str | None, typer.Option("--data", help="As for prune; the built-in model's is demo.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of table, page and numbers.")] = Path("comparison"),
    ratio: Annotated[str | None, typer.Option("--ratio", help="Shares of the layers, for example 0.125,0.25.")] = None,
    num_layers: Annotated[str | None, typer.Option("--num-layers", help="Numbers of layers, for example 1,2.")] = None,
    arms: Annotated[str, typer.Option("--arms", help="core, all, or names with commas; see docs/results.md.")] = "core",
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of calibration windows and order.")] = "0,1,2",
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Text of another domain.")] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    preset: Preset = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    allow_remote_code: RemoteCode = False,
    resume: Resume = False,
    restart: Restart = False,
    as_json: Json = False,
) -> None:
    """Prune in many ways with the same tokens, and say which way is best."""
    from trsp_fast.compare.arms import chosen_arms
    from trsp_fast.compare.output import compare_into
    from trsp_fast.compare.runner import layer_counts
    from trsp_fast.config import TRSPConfig
    from trsp_fast.data import check_source
    from trsp_fast.report.comparison import sentences, table_head, table_rows
    from trsp_fast.report.record import versions
    from trsp_fast.run.output import check_output

    chosen, numbers = chosen_arms(arms), number_list("seeds", seeds, int)
    values = config_values(None, None, None, None, preset, config, settings, device, dtype)
    base = TRSPConfig.from_dict(values)
    if data is None:
        if model != resolved("demo"):
            raise UserError("--data is missing; give what to calibrate and evaluate on.")
        data = "demo"
    for source in (data, eval_data):
        check_source(source)
    check_output(out, resume=resume)
    loaded = load(model, base, revision, allow_remote_code)
    counts = layer_counts(loaded, number_list("ratio", ratio, float), number_list("num_layers", num_layers, int))
    comparer = _comparer(loaded, tokenizer_of(model, data, revision, allow_remote_code), data, eval_data, base, as_json)
    about = {
        "model": "the built-in demo model" if model == resolved("demo") else model,
        "data": data,
        "evaluation_data": eval_data,
        "command": shlex.join(["trsp-fast", *sys.argv[1:]]),
        "versions": versions(),
    }
    found = compare_into(out, comparer, chosen, counts, numbers, about, resume=resume, restart=restart)
    if as_json:
        print(json.dumps(found))
        return
    table(table_head(found["arms"]), table_rows(found["arms"]))
    text = "\n".join(sentences(found["arms"], found["layers"])).replace("**", "")
    print(f"{text}\ntable, page and numbers: {out}")


def _comparer(loaded: Any, tokenizer: Any, data: str, eval_data: str | None, config: Any, as_json: bool) -> Any:
    """The model with its calibration windows by seed, and what is evaluated on."""
    from trsp_fast import data as sources
    from trsp_fast.compare.runner import Comparer
    from trsp_fast.report.terminal import progress_listener
    from trsp_fast.run.events import Events

    streams = sources.load_streams(data, tokenizer)
    length = sources.window_length(loaded.config, config.data.seq_len)
    other = None
    if eval_data is not None:
        other = sources.evaluation_windows(sources.evaluation_stream(eval_data, tokenizer), length, EVALUATION_WINDOWS)
    return Comparer(
        loaded,
        lambda seed: sources.calibration_windows(streams.calibration, config.data.samples, length, seed),
        sources.evaluation_windows(streams.evaluation, length, EVALUATION_WINDOWS),
        config,
        other,
        events=Events() if as_json else Events(progress_listener(only=("arm", "arm_done", "note"))),
    )


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
    except (ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} holds other things than a report ({error}); give a folder written by prune or demo."
        ) from None
    print_answer({"report": str(folder / "report.html")}, as_json, f"{headline(values)}\n{folder / 'report.html'}")
