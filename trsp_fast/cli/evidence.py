"""eval and report: how good a model is."""

import math
from pathlib import Path
from typing import Annotated

import typer

from trsp_fast.cli.app import app
from trsp_fast.cli.common import load, print_answer, tokenizer_of
from trsp_fast.cli.options import Data, Device, Dtype, Json, Model, RemoteCode, Revision
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
    print_answer({"report": str(folder / "report.html")}, as_json, f"{headline(values)}\n{folder / 'report.html'}")
