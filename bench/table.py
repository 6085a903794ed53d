"""The honest table: this method and its rivals on the built-in model at equal tokens, 3 of 12 layers.

python bench/table.py [--seeds 0,1,2] [--samples 256] [--epochs 1]
"""

import argparse
import statistics
from typing import Any

from arms import Subject, write_results

from trsp_fast.config import PRESETS

TUNE = {"gate": "none", "objective": "lm", "lambda2": 0.0, "lr": 5e-4, "warmup": 0.05}
CUT_FIRST = {"gate": "anneal", "hold": 1.0, "lambda2": 0.0, "lr": 5e-4, "warmup": 0.05}
PAPER = {name: dict(values) for name, values in PRESETS["paper"].items()}

# arm -> (how layers are chosen, how they are transferred; None: not at all)
ARMS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "dense": (None, None),
    "dense, tuned on the same tokens": (None, TUNE),
    "direct cut, trsp": ({}, None),
    "direct cut, trsp as published": (PAPER["select"], None),
    "direct cut, sleb": ({"method": "sleb"}, None),
    "direct cut, block influence": ({"method": "shortgpt"}, None),
    "direct cut, random": ({"method": "random"}, None),
    "trsp, default": ({}, {}),
    "trsp, as published": (PAPER["select"], PAPER["transfer"]),
    "trsp, as published at lr 5e-4, lambda2 1": (PAPER["select"], {**PAPER["transfer"], "lr": 5e-4, "lambda2": 1.0}),
    "trsp choice, published penalty at lr 5e-4, lambda2 1": ({}, {**PAPER["transfer"], "lr": 5e-4, "lambda2": 1.0}),
    "sleb, cut then tuned (lm)": ({"method": "sleb"}, {**CUT_FIRST, "objective": "lm"}),
    "sleb, cut then distilled": ({"method": "sleb"}, {**CUT_FIRST, "objective": "distill"}),
    "block influence, cut then distilled": ({"method": "shortgpt"}, {**CUT_FIRST, "objective": "distill"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--count", type=int, default=3)
    arguments = parser.parse_args()
    subject = Subject.demo()
    rows: list[dict[str, Any]] = []
    for seed in map(int, arguments.seeds.split(",")):
        tokens = subject.calibration(arguments.samples, seed)
        # choices see the first 128 windows, so that every method of choosing has the same text and SLEB ends today
        seen: dict[str, list[int]] = {}
        for arm, (select, settings) in ARMS.items():
            layers: list[int] = []
            if select is not None:
                if str(select) not in seen:
                    seen[str(select)] = subject.chosen(tokens[:128], arguments.count, seed, select)[0]
                layers = seen[str(select)]
            if settings is None:
                row: dict[str, Any] = {"perplexity": subject.cut_perplexity(layers), "tokens": 0, "seconds": 0.0}
            else:
                row = subject.transferred(tokens, layers, seed, {**settings, "epochs": arguments.epochs})
            rows.append({"arm": arm, "seed": seed, "layers": layers, **row})
            print(f"seed {seed}  {arm:55} {layers!s:14} {row['perplexity']:9.3f}  {row['seconds']} s", flush=True)
    path = write_results("table_demo", rows, samples=arguments.samples, epochs=arguments.epochs)
    print("\n| arm | layers (seed 0) | perplexity, mean of seeds | smallest - largest |\n|---|---|---|---|")
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        values = [row["perplexity"] for row in mine]
        spread = f"{min(values):.2f} - {max(values):.2f}"
        print(f"| {arm} | {', '.join(map(str, mine[0]['layers'])) or '-'} | {statistics.mean(values):.2f} | {spread} |")
    print(path)


if __name__ == "__main__":
    main()
