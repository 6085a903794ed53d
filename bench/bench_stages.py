"""What the method costs: seconds of stage 1 by judge and of stage 2 by recipe, in turn in one process.

python bench/bench_stages.py [--device cuda] [--shape 1B | --model FOLDER] [--samples 64] [--seq 2048] [--pairs 2]

A shape is a Llama of random weights on random tokens, of which no choice is clear: as many races and second looks as
there can be. Every pair of runs begins with the same weights; before the first, each recipe runs once on few windows.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from step_arms import SHAPES, random_llama
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.compare.arms import ARMS
from trsp_fast.config import TRSPConfig, merge, parse_setting
from trsp_fast.data import load_streams
from trsp_fast.errors import UserError
from trsp_fast.models.checkpoint import load_model, load_tokenizer
from trsp_fast.models.families import layer_stack
from trsp_fast.run.events import Events
from trsp_fast.select import choose_layers
from trsp_fast.transfer import transfer

SELECT: dict[str, dict[str, Any]] = {"fold": {}, "fold-no-exchange": {"exchange": False}, "cut": {"judge": "cut"}}
TRANSFER = ("trsp", "trsp-no-fold", "trsp-fold", "lm-then-cut", "cut-sleb-lm")
WARM = 8  # windows


def main() -> None:
    arguments = parse()
    fresh, tokens = subject_of(arguments)
    try:
        base = TRSPConfig.from_dict(merge({"num_layers": arguments.num_layers}, *map(parse_setting, arguments.set)))
        base.layer_count(len(layer_stack(fresh())))
    except UserError as error:
        sys.exit(str(error))
    calls = {("stage 1", name): one_choice(base, changes) for name, changes in SELECT.items()}
    for arm in TRANSFER:
        calls["stage 2", arm] = one_training(ARMS[arm].config(base, base.seed), arguments.num_layers)
    calls = {key: call for key, call in calls.items() if key[1] in arguments.only.split(",")}
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    for run in range(arguments.pairs + 1):
        for key, call in calls.items():
            model = fresh()
            synchronize(arguments.device)
            began = time.perf_counter()
            facts[key] = call(model, tokens if run else tokens[:WARM])
            synchronize(arguments.device)
            if run:
                found[key].append(time.perf_counter() - began)
                print(f"{', '.join(key)}: {found[key][-1]:.2f} s {facts[key]}", flush=True)
            del model
    content = {
        "machine": measure.machine(arguments.device),
        "model": Path(arguments.model).name if arguments.model else arguments.shape,
        "windows": list(tokens.shape),
        "removed": arguments.num_layers,
        "settings": arguments.set,
        "rows": [row_of(key, seconds, facts[key], found) for key, seconds in found.items()],
    }
    for row in content["rows"]:
        print(f"{row['stage']}, {row['name']}: {row['seconds']:.2f} s, {row['ratio'] or '-'} times lm-then-cut's")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n")


def row_of(
    key: tuple[str, str], seconds: list[float], facts: dict[str, Any], found: dict[tuple[str, str], list[float]]
) -> dict[str, Any]:
    """`ratio`: the median over pairs, of stage 2 beside training on the language modelling loss."""
    usual = found.get(("stage 2", "lm-then-cut"), [])
    ratios = [own / other for own, other in zip(seconds, usual, strict=False)] if key[0] == "stage 2" else []
    return {
        "stage": key[0],
        "name": key[1],
        "seconds": round(statistics.median(seconds), 3),
        "runs": [round(one, 3) for one in seconds],
        "ratio": round(statistics.median(ratios), 3) if ratios else None,
        **facts,
    }


def one_choice(base: TRSPConfig, changes: dict[str, Any]) -> Callable[[PreTrainedModel, Tensor], dict[str, Any]]:
    config = TRSPConfig.from_dict(merge(base.to_dict(), {"select": changes}))

    def choose(model: PreTrainedModel, tokens: Tensor) -> dict[str, Any]:
        selection = choose_layers(model, tokens, config)
        return {"layers": selection.layers, "window_forwards": selection.window_forwards}

    return choose


def one_training(config: TRSPConfig, count: int) -> Callable[[PreTrainedModel, Tensor], dict[str, Any]]:
    """`fold_seconds`: until the fold had ended, with the untouched model's states of all windows before it."""

    def train(model: PreTrainedModel, tokens: Tensor) -> dict[str, Any]:
        total, began, facts = len(layer_stack(model)), time.perf_counter(), dict[str, Any]()

        def listen(kind: str, _values: dict[str, Any]) -> None:
            if kind == "folded":
                facts["fold_seconds"] = round(time.perf_counter() - began, 3)

        layers = [1 + index * (total - 1) // count for index in range(count)]  # spread: nearly all that stay are folded
        transfer(model, tokens, layers, config, Events(listen))
        return facts

    return train


def subject_of(arguments: argparse.Namespace) -> tuple[Callable[[], PreTrainedModel], Tensor]:
    """The model, as often as wanted, and calibration windows."""
    draw = torch.Generator().manual_seed(0)
    if arguments.model is None:
        dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
        shape = (arguments.samples, arguments.seq)
        tokens = torch.randint(0, SHAPES[arguments.shape]["vocab_size"], shape, generator=draw)
        return lambda: random_llama(arguments.shape, arguments.device, dtype, arguments.seq), tokens
    model = load_model(arguments.model, dtype="float32", device=arguments.device)
    stream = load_streams("demo", load_tokenizer(arguments.model)).calibration
    starts = torch.randint(0, len(stream) - arguments.seq, (arguments.samples,), generator=draw)
    return lambda: copy.deepcopy(model), torch.stack([stream[start : start + arguments.seq] for start in starts])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1B")
    parser.add_argument("--model", help="a folder with a model instead, on the built-in calibration text")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--only", default=",".join((*SELECT, *TRANSFER)), help="some rows, by name: %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.only.split(",") if name not in (*SELECT, *TRANSFER)]:
        parser.error(f"--only has {unknown[0]!r}; give some of {', '.join((*SELECT, *TRANSFER))}.")
    if arguments.pairs < 1:
        parser.error(f"--pairs is {arguments.pairs}; give 1 or more.")
    return arguments


if __name__ == "__main__":
    main()
