"""What commands do before and after the public function that they are the face of."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from trsp_fast.errors import UserError

EVALUATION_WINDOWS = 128  # windows that prune and demo measure perplexity on; `eval` takes all

_wishes: list[int] = []  # the signals that asked for the end


def take_wishes_to_end() -> None:
    """SIGTERM ends a command as Ctrl-C does, by an exception, so that nothing is left half-written."""
    _wishes.clear()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as for a job in the background of a script
            signal.signal(number, _wish)


def _wish(number: int, _frame: object) -> None:
    _wishes.append(number)
    end_if_wished()


def end_if_wished() -> None:
    """End now if that was wanted before: what is being imported may have swallowed the exception."""
    if signal.SIGTERM in _wishes:
        sys.exit(143)
    if _wishes:
        raise KeyboardInterrupt


def config_values(
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
    options: dict[str, Any] = {name: number(text) for name, text in numbers.items()} | {"preset": preset}
    options["layers"] = None if layers is None else tuple(layer_list(layers))
    options |= {"device": None if device == "auto" else device, "dtype": None if dtype == "auto" else dtype}
    given = {name: value for name, value in options.items() if value is not None}
    from_file = read_file(config) if config else {}
    return merge(from_file, *(parse_setting(text) for text in settings or []), given)


def number(text: str | None) -> float | int | str | None:
    """The number that a text says; other text stays what it is, for the configuration to refuse by its field's name."""
    for kind in (int, float):
        try:
            return None if text is None else kind(text)
        except ValueError:
            continue
    return text


def layer_list(text: str | None) -> list[int]:
    if not text:
        raise UserError("no layers were named; give them as --layers 3,6,9.")
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"layers are {text!r}; give whole numbers with commas, for example 3,6,9.") from None


def number_list(name: str, text: str | None, kind: type[int] | type[float]) -> list[Any]:
    """Numbers with commas between them; none for no text."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{name} is {text!r}; give {what} with commas.") from None


def on_disk(checkpoint: str, revision: str | None, only: str | None = None) -> str:
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


def load(
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

    quiet_transformers()
    end_if_wished()
    wanted = dtype or str(run_dtype(config, resolve_device(config.device))).removeprefix("torch.")
    device = device or (config.device if config.run.offload == "none" else "cpu")
    loaded = load_model(model, dtype=wanted, device=device, revision=revision, remote_code=remote_code)
    end_if_wished()
    return loaded


def tokenizer_of(model: str, data: str, revision: str | None, remote_code: bool) -> Any:
    from trsp_fast.models.checkpoint import load_tokenizer

    try:
        return load_tokenizer(model, revision=revision, remote_code=remote_code)
    except UserError:
        if data.endswith(".safetensors"):
            return None
        raise


def windows_of(
    loaded: Any, model: str, data: str, eval_data: str | None, config: Any, revision: str | None, remote_code: bool
) -> tuple[Any, Any]:
    """Calibration and evaluation windows for a model."""
    from trsp_fast import data as sources

    streams = sources.load_streams(data, tokenizer_of(model, eval_data or data, revision, remote_code), eval_data)
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


def byte_bar(title: str, as_json: bool) -> Any:
    """A context that gives progress(done, total) in bytes: a bar on a terminal, nothing elsewhere."""
    if as_json or not sys.stderr.isatty():
        return contextlib.nullcontext()
    from trsp_fast.report.terminal import byte_bar

    return byte_bar(title)


def step_bar(title: str, as_json: bool) -> Any:
    """A context that gives progress(done, total) in steps: a bar on a terminal, nothing elsewhere."""
    if as_json or not sys.stderr.isatty():
        return contextlib.nullcontext(lambda done, total: None)
    from trsp_fast.report.terminal import step_bar

    return step_bar(title)


def events_for(as_json: bool) -> Any:
    from trsp_fast.report.terminal import progress_listener
    from trsp_fast.run.events import Events

    return Events() if as_json else Events(progress_listener())


def quiet_libraries() -> None:
    """Other libraries' progress bars and advice do not belong into this tool's output."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def quiet_transformers() -> None:
    """The same for transformers, once a command needs it."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def plain(checks: list[Any]) -> list[dict[str, Any]]:
    from dataclasses import asdict

    return [asdict(check) for check in checks]


def print_answer(answer: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(answer) if as_json else text)


def say(text: str, as_json: bool) -> None:
    if not as_json:
        print(text, file=sys.stderr)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from trsp_fast.report.terminal import print_table

    print_table(head, rows)
