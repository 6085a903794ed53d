"""speed: how fast models are, in how much memory, beside each other."""

import dataclasses
import datetime
from typing import Annotated, Any

import typer

from trsp_fast.cli.app import app
from trsp_fast.cli.common import load, number_list, print_answer, say, step_bar, table
from trsp_fast.cli.options import Device, Dtype, Json, RemoteCode, Revision, resolved
from trsp_fast.errors import UserError


@app.command()
def speed(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL [PRUNED ...]", help="Folders, hub names or demo.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Random weights instead: opt-13b, llama2-13b, phi-2, ...")
    ] = None,
    ratio: Annotated[
        str | None, typer.Option("--ratio", help="The first model without these shares of its layers too: 0.25,0.5.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences generated at once.")] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens generated of each sequence.")] = 128,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of the prompt of the latency.")] = 2048,
    rounds: Annotated[int, typer.Option("--rounds", help="Timed rounds; medians are told.")] = 5,
    static_cache: Annotated[bool, typer.Option("--static-cache", help="Generate with a static cache too.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="With a compiled decoding step too.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    allow_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Throughput, latency and memory of models, by the protocol of the paper's table 2."""
    from trsp_fast.config import TRSPConfig
    from trsp_fast.pruner import versions
    from trsp_fast.report.footprint import processor
    from trsp_fast.report.speed import Protocol, compare_speed

    caches = ("dynamic", *["static"] * static_cache, *["compiled"] * compiled)
    wanted = Protocol(batch=batch, new_tokens=new_tokens, prompt=prompt, rounds=rounds, caches=caches)
    config = TRSPConfig.from_dict({"dtype": dtype, "device": device})
    subjects, files = _subjects(models or [], shape, config, revision, allow_remote_code)
    subjects += _without_layers(subjects[0], number_list("ratio", ratio, float))
    names, loaded = [name for name, _ in subjects], [model for _, model in subjects]
    protocol, notes = wanted.within(loaded)
    for note in notes:
        say(f"note: {note}", as_json)
    with step_bar("measuring", as_json) as progress:
        found = compare_speed(loaded, protocol, progress)
    answer = {
        "machine": {"device": processor(loaded[0].device), "date": datetime.date.today().isoformat(), **versions()},
        "dtype": str(loaded[0].dtype).removeprefix("torch."),
        "protocol": dataclasses.asdict(protocol),
        "notes": notes,
        "models": [
            {"model": name, "checkpoint_bytes": files.get(name), **dataclasses.asdict(one)}
            for name, one in zip(names, found, strict=True)
        ],
    }
    if as_json:
        print_answer(answer, True, "")
        return
    _print_tables(answer)


def _subjects(
    models: list[str], shape: str | None, config: Any, revision: str | None, remote_code: bool
) -> tuple[list[tuple[str, Any]], dict[str, int]]:
    """(name, model) of each that was asked for, and the bytes of the checkpoints that are folders."""
    from trsp_fast.engine.precision import run_dtype
    from trsp_fast.models.checkpoint import resolve_device
    from trsp_fast.models.checkpoint_files import loaded_files
    from trsp_fast.report.shapes import random_model

    if (shape is None) == (not models):
        given = f"both {', '.join(models)} and --shape {shape} were" if models else "neither was"
        raise UserError(f"{given} given; name models to measure, or a --shape.")
    if shape is not None:
        place = resolve_device(config.device)
        return [(shape, random_model(shape, device=place, dtype=run_dtype(config, place)))], {}
    subjects, files = [], {}
    for index, name in enumerate(models):
        shown = name if name not in models[:index] else f"{name} ({models[:index].count(name) + 1})"
        subjects.append((shown, load(resolved(name), config, revision, remote_code)))
        if size := sum(path.stat().st_size for path in loaded_files(resolved(name))):
            files[shown] = size
    return subjects, files


def _without_layers(first: tuple[str, Any], ratios: list[float]) -> list[tuple[str, Any]]:
    """The model without its last layers; which ones go makes no difference to its speed."""
    from trsp_fast.config import TRSPConfig
    from trsp_fast.models.families import layer_stack
    from trsp_fast.models.removal import remove_layers

    name, model = first
    total = len(layer_stack(model))
    counts = [TRSPConfig(ratio=ratio).layer_count(total) for ratio in ratios]
    return [
        (f"{name} without {count} of {total} layers", remove_layers(model, range(total - count, total)))
        for count in counts
    ]


def _print_tables(answer: dict[str, Any]) -> None:
    from trsp_fast.report.html import figure_text, size_text

    def work(title: str, unit: str, found: list[tuple[dict[str, Any], float, int]]) -> None:
        waits = found[0][0]["host_bound"] is not None
        head = (title, unit, "times as fast", "peak memory", *(["waits for host"] if waits else []))
        rows: list[tuple[str, ...]] = []
        for name, (measured, value, digits) in zip(names, found, strict=True):
            memory = "-" if measured["peak_bytes"] is None else size_text(measured["peak_bytes"])
            host = [f"{measured['host_bound'] or 0:.0%}"] if waits else []
            rows.append((name, figure_text(value, digits), f"{measured['times_first']:.2f}", memory, *host))
        table(head, rows)

    models, protocol = answer["models"], answer["protocol"]
    names = [one["model"] for one in models]
    print(
        f"{answer['machine']['device']}, {answer['dtype']}, "
        f"{protocol['batch']} sequences of {protocol['new_tokens']} new tokens\n"
    )
    for cache in protocol["caches"]:
        generated = [one["generation"][cache] for one in models]
        work(f"generating, {cache} cache", "tokens/s", [(g, g["tokens_per_second"], 0) for g in generated])
    latencies = [one["latency"] for one in models]
    work(f"reading {protocol['prompt']} tokens", "ms", [(found, found["seconds"] * 1e3, 1) for found in latencies])
    sizes: list[tuple[str, ...]] = []
    for one in models:
        files = "-" if one["checkpoint_bytes"] is None else size_text(one["checkpoint_bytes"])
        share = f"{one['parameters_of_first']:.2f}"
        sizes.append((one["model"], str(one["layers"]), f"{one['parameters']:,}", share, files))
    table(("size", "layers", "parameters", "of the first", "checkpoint"), sizes)
