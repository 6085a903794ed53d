"""eval, compare and report: how good a model is, and a way of pruning."""

import json
import math
import shlex
import statistics
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
    step_bar,
    table,
    tokenizer_of,
)
from trsp_fast.cli.options import (
    ConfigFile,
    Device,
    Dtype,
    Json,
    Limit,
    Model,
    Preset,
    RemoteCode,
    Restart,
    Resume,
    Revision,
    Settings,
    TaskPath,
    Tasks,
    resolved,
)
from trsp_fast.errors import UserError

PROTOCOLS = ("standard", "authors")
AUTHORS_WINDOW = 2048  # tokens of a window, whatever the model's context; see trsp_fast.report.perplexity


@app.command(name="eval")
def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option("--data", help="As for prune; needed without --tasks.")] = None,
    protocol: Annotated[str, typer.Option("--protocol", help="standard, or authors as the paper's.")] = "standard",
    seq_len: Annotated[int, typer.Option("--seq-len", help="Window; min(2048, context) by default.")] = 0,
    stride: Annotated[int | None, typer.Option("--stride", help="A window every so many tokens.")] = None,
    tasks: Tasks = None,
    limit: Limit = None,
    task_path: TaskPath = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    allow_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a model (non-overlapping windows, token-weighted mean), and its scores on tasks."""
    from trsp_fast.config import TRSPConfig
    from trsp_fast.data import check_source

    if protocol not in PROTOCOLS:
        raise UserError(f"the protocol is {protocol!r}; give {' or '.join(PROTOCOLS)}.")
    if protocol == "authors":
        data = data or "wikitext2"
        if stride is not None:
            raise UserError(f"--stride is {stride} and the authors' protocol has none; leave out one of them.")
    names = _checked_tasks(tasks, limit, task_path)
    if data is None and not names:
        raise UserError("nothing says what to evaluate on; give --data, or --tasks.")
    config = TRSPConfig.from_dict({"dtype": dtype, "device": device, "data": {"seq_len": seq_len}})
    check_source(data)
    loaded = load(model, config, revision, allow_remote_code)
    tokenizer = tokenizer_of(model, "" if names or data is None else data, revision, allow_remote_code)
    answer: dict[str, Any] = {"model": model}
    lines = []
    if data is not None:
        found = _perplexity(loaded, tokenizer, data, protocol, seq_len, stride, as_json)
        answer |= {"data": data, **found}
        every = f", one every {stride}" if stride else ""
        value = math.inf if found["perplexity"] is None else found["perplexity"]
        lines.append(f"perplexity {value:.4f} on {found['tokens']:,} tokens in windows of {found['seq_len']}{every}")
    if names:
        from trsp_fast.report.tasks import score_tasks

        scores = score_tasks(loaded, tokenizer, names, limit=limit, include_path=task_path)
        answer |= {"tasks": scores, "limit": limit, "tasks_mean": statistics.mean(scores.values())}
        lines += [f"{name} {score:.4f}" for name, score in scores.items()]
        lines += [f"mean of {len(scores)} tasks {answer['tasks_mean']:.4f}"] if len(scores) > 1 else []
    print_answer(answer, as_json, "\n".join(lines))


def _perplexity(
    loaded: Any, tokenizer: Any, data: str, protocol: str, seq_len: int, stride: int | None, as_json: bool
) -> dict[str, Any]:
    from trsp_fast.data import check_vocabulary, evaluation_stream, evaluation_windows, window_length
    from trsp_fast.report.perplexity import authors_perplexity, perplexity, strided_perplexity

    if protocol == "authors" and not seq_len:
        seq_len = AUTHORS_WINDOW
        if seq_len > (context := window_length(loaded.config, 0)):
            raise UserError(
                f"the authors' protocol has windows of {seq_len} tokens and the model's context is {context}; give "
                f"--seq-len {context} for shorter ones."
            )
    stream = evaluation_stream(data, tokenizer)
    if stream.dim() == 2 and not seq_len:
        seq_len = stream.shape[1]
    length = window_length(loaded.config, seq_len)
    check_vocabulary(stream, loaded.config.get_text_config(decoder=True).vocab_size)
    with step_bar("windows", as_json) as progress:
        if stride is not None:
            value, tokens = strided_perplexity(loaded, stream, length, stride, progress=progress), stream
        else:
            tokens = evaluation_windows(stream, length)
            judge = authors_perplexity if protocol == "authors" else perplexity
            value = judge(loaded, tokens, progress=progress)
    finite = value if math.isfinite(value) else None  # JSON has no infinity
    about = {"protocol": protocol, "tokens": tokens.numel(), "seq_len": length, "stride": stride}
    return {"perplexity": finite, **about}


def _checked_tasks(tasks: str | None, limit: int | None, task_path: Path | None) -> list[str]:
    """The tasks' names, known before a model is loaded; a limit or a folder without tasks is a mistake."""
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names and (tasks is not None or limit is not None or task_path is not None):
        raise UserError("no tasks were named; give them as --tasks piqa,arc_easy.")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; give 1 or more examples, or leave it out for all.")
    if names:
        from trsp_fast.report.tasks import task_manager

        task_manager(names, task_path)
    return names


@app.command()
def compare(
    model: Model,
    data: Annotated[str | None, typer.Option("--data", help="As for prune; the built-in model's is demo.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of table, page and numbers.")] = Path("comparison"),
    ratio: Annotated[str | None, typer.Option("--ratio", help="Shares of the layers, for example 0.125,0.25.")] = None,
    num_layers: Annotated[
        str | None, typer.Option("--num-layers", help="Numbers of layers, for example 1,2; beside --ratio, both.")
    ] = None,
    arms: Annotated[
        str, typer.Option("--arms", help="Names with commas; core, parts and all are many; see docs/results.md.")
    ] = "core",
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds of calibration windows and order.")] = "0,1,2",
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Text of another domain.")] = None,
    config: ConfigFile = None,
    settings: Settings = None,
    preset: Preset = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    allow_remote_code: RemoteCode = False,
    tasks: Tasks = None,
    limit: Limit = None,
    task_path: TaskPath = None,
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
    from trsp_fast.report.comparison import by_amount, sentences, table_head, table_rows
    from trsp_fast.report.record import versions
    from trsp_fast.run.output import check_output

    chosen, numbers = chosen_arms(arms), number_list("seeds", seeds, int)
    if len(set(numbers)) != max(1, len(numbers)):
        raise UserError(f"seeds is {seeds!r}; give at least one, and each only once.")
    base = TRSPConfig.from_dict(config_values(None, None, None, None, preset, config, settings, device, dtype))
    ratios, layer_numbers = _amounts(base, ratio, num_layers)
    for seed in numbers:
        TRSPConfig(num_layers=1, seed=seed)  # refuses one that is out of range
    if data is None:
        if model != resolved("demo"):
            raise UserError("--data is missing; give what to calibrate and evaluate on.")
        data = "demo"
    for source in (data, eval_data):
        check_source(source)
    check_output(out, resume=resume)
    names = _checked_tasks(tasks, limit, task_path)
    loaded = load(model, base, revision, allow_remote_code)
    counts = layer_counts(loaded, ratios, layer_numbers)
    tokenizer = tokenizer_of(model, "" if names else data, revision, allow_remote_code)
    comparer = _comparer(loaded, tokenizer, data, eval_data, base, as_json)
    if names:
        from trsp_fast.report.tasks import score_tasks

        comparer.tasks = lambda small: score_tasks(small, tokenizer, names, limit=limit, include_path=task_path)
        comparer.tasks_about = {"names": names, "limit": limit}
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
    for some, without in by_amount(found["arms"], found["problems"]):
        table(table_head(some), table_rows(some))
        print("\n".join(sentences(some, found["layers"], without)).replace("**", ""))
    print(f"table, page and numbers: {out}")


def _amounts(base: Any, ratio: str | None, num_layers: str | None) -> tuple[list[float], list[int]]:
    """Shares and numbers of layers to compare at: those of the options, else the configuration's."""
    if base.layers is not None or base.seed:
        what = f"seed is {base.seed}" if base.seed else f"layers is {list(base.layers or ())}"
        raise UserError(f"{what} in the configuration; a comparison takes --seeds, and --ratio or --num-layers.")
    ratios, numbers = number_list("ratio", ratio, float), number_list("num_layers", num_layers, int)
    if ratios or numbers:
        return ratios, numbers
    return [] if base.ratio is None else [base.ratio], [] if base.num_layers is None else [base.num_layers]


def _comparer(loaded: Any, tokenizer: Any, data: str, eval_data: str | None, config: Any, as_json: bool) -> Any:
    """The model with its calibration windows by seed, and what is evaluated on."""
    from trsp_fast import data as sources
    from trsp_fast.compare.runner import Comparer
    from trsp_fast.report.terminal import progress_listener
    from trsp_fast.run.events import Events

    streams = sources.load_streams(data, tokenizer)
    length = sources.window_length(loaded.config, config.data.seq_len)
    vocabulary, other = loaded.get_input_embeddings().num_embeddings, None
    for stream in (streams.calibration, streams.evaluation):
        sources.check_vocabulary(stream, vocabulary)
    if eval_data is not None:
        other = sources.evaluation_windows(sources.evaluation_stream(eval_data, tokenizer), length, EVALUATION_WINDOWS)
        sources.check_vocabulary(other, vocabulary)
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
