"""A whole run of prune, from a random Llama in memory to the proven checkpoint on disk: seconds by part, peak memory.

python bench/bench_e2e.py [--device cuda] [--shape 7B] [--samples 128] [--seq 2048] [--ratio 0.25] [--set FIELD=VALUE]

The recipe is the preset `paper` (one pass over the data a round, one in stage 2), on random tokens. Where stage 2 with
all weights does not fit, say so: `--set transfer.trainable=neighbours` or `--set transfer.epochs=0`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import torch
from step_arms import SHAPES, random_llama

import trsp_fast as trsp
from trsp_fast.config import merge, parse_setting
from trsp_fast.models.checkpoint import checkpoint_bytes
from trsp_fast.run.events import Events


def main() -> None:
    arguments = parse()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    model = random_llama(arguments.shape, arguments.device, dtype, arguments.seq)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    draw = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[arguments.shape]["vocab_size"]
    tokens = torch.randint(0, vocabulary, (arguments.samples, arguments.seq), generator=draw)
    values = {"ratio": arguments.ratio, "device": arguments.device}
    config = trsp.TRSPConfig.from_preset("paper", **merge(values, *map(parse_setting, arguments.set)))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        out, began = Path(folder) / "pruned", time.perf_counter()
        plans: list[dict[str, Any]] = []

        def listen(kind: str, values: dict[str, Any]) -> None:
            say(kind, values)
            if kind == "plan":
                plans.append(dict(values))

        result = trsp.prune(model, tokens, config, out=out, events=Events(listen))
        seconds = time.perf_counter() - began
        content: dict[str, Any] = {
            "machine": measure.machine(arguments.device),
            "shape": arguments.shape,
            "samples": arguments.samples,
            "seq": arguments.seq,
            "settings": arguments.set,
            "seconds": round(seconds, 1),
            "parts": result.report["seconds"],
            "removed_layers": result.removed_layers,
            "weight_bytes": weights,
            "checkpoint_bytes": checkpoint_bytes(out),
            "plans": plans,
            "peak_bytes": torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None,
            "proven": result.report["proven"],
        }
    print(json.dumps(content, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n")


def say(kind: str, values: dict[str, Any]) -> None:
    """What a person wants to know while it goes."""
    if kind in ("note", "phase", "plan", "round"):
        print(kind, {name: value for name, value in values.items() if not isinstance(value, list)}, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="7B")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--folder", help="where the checkpoint is written meanwhile")
    parser.add_argument("--json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
