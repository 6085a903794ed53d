"""The sweep that chose the defaults of TRSPConfig: stage 1 by the direct cut, stage 2 at equal tokens.

python bench/sweep_defaults.py select|transfer [--model FOLDER --data TEXT --count N] [--name NAME]
"""

import argparse

from arms import Subject, write_results

PUBLISHED = {
    "optimizer": "adam",
    "lr": 1e-2,
    "lambda1": 5e-3,
    "rank": "magnitude",
    "shortlist": 0,
    "steps_per_round": 8,
}
NATURAL = {"optimizer": "natural", "lr": 0.5, "lambda1": 5e-4, "steps_per_round": 4}
SELECT = {
    "published, output": {**PUBLISHED, "gate_mode": "output"},
    "published, residual": PUBLISHED,
    "published + shortlist 3": {**PUBLISHED, "shortlist": 3},
    "natural, magnitude": {**NATURAL, "rank": "magnitude", "shortlist": 0},
    "natural, magnitude + shortlist 3": {**NATURAL, "rank": "magnitude", "shortlist": 3},
    "natural, fisher": {**NATURAL, "rank": "fisher", "shortlist": 0},
    "natural, fisher, 8 steps": {**NATURAL, "rank": "fisher", "shortlist": 0, "steps_per_round": 8},
    "natural, fisher + shortlist 3": {**NATURAL, "rank": "fisher", "shortlist": 3},
    "natural, fisher + shortlist 4": {**NATURAL, "rank": "fisher", "shortlist": 4},
    "natural, lr 0.1, fisher + shortlist 3": {**NATURAL, "lr": 0.1, "rank": "fisher", "shortlist": 3},
    "natural, lr 0.1, fisher + shortlist 4": {**NATURAL, "lr": 0.1, "rank": "fisher", "shortlist": 4},
    "natural, lr 0.02, fisher + shortlist 4": {**NATURAL, "lr": 0.02, "rank": "fisher", "shortlist": 4},
    "natural, lr 0.1, magnitude + shortlist 3": {**NATURAL, "lr": 0.1, "rank": "magnitude", "shortlist": 3},
    "gates fixed at 1, fisher + shortlist 3": {**NATURAL, "lr": 0.0, "rank": "fisher", "shortlist": 3},
    "sleb": {"method": "sleb"},
    "block influence": {"method": "shortgpt"},
}

ANNEAL = {
    "gate": "anneal",
    "objective": "distill",
    "hidden": 0.0,
    "lambda_schedule": "constant",
    "detach_input": False,
    "lr": 1e-3,
}
TRANSFER = {
    "published penalty, lm, lambda2 1": {**ANNEAL, "gate": "none", "objective": "lm", "lambda2": 1.0},
    "penalty growing to 30, detached, distill": {
        **ANNEAL, "gate": "none", "lambda2": 30.0, "lambda_schedule": "grow", "detach_input": True
    },
    "anneal, hold 0.3, lambda2 0": {**ANNEAL, "hold": 0.3, "lambda2": 0.0},
    "anneal, hold 0.3, lambda2 0.1": {**ANNEAL, "hold": 0.3, "lambda2": 0.1},
    "anneal, hold 0.3, lambda2 0.1, detached": {**ANNEAL, "hold": 0.3, "lambda2": 0.1, "detach_input": True},
    "anneal, hold 0.6, lambda2 0.1": {**ANNEAL, "hold": 0.6, "lambda2": 0.1},
    "anneal, hold 0.6, lambda2 0.1, detached": {**ANNEAL, "hold": 0.6, "lambda2": 0.1, "detach_input": True},
    "anneal, hold 0.6, lambda2 1, detached": {**ANNEAL, "hold": 0.6, "lambda2": 1.0, "detach_input": True},
    "anneal, hold 0.8, lambda2 0.1, detached": {**ANNEAL, "hold": 0.8, "lambda2": 0.1, "detach_input": True},
    "anneal, hold 0.8, lambda2 1, detached": {**ANNEAL, "hold": 0.8, "lambda2": 1.0, "detach_input": True},
    "anneal, hold 0.8, lambda2 0.1, detached, lr 2e-3": {
        **ANNEAL, "hold": 0.8, "lambda2": 0.1, "detach_input": True, "lr": 2e-3
    },
    "anneal, hold 0.8, lambda2 1, detached, lr 5e-4": {
        **ANNEAL, "hold": 0.8, "lambda2": 1.0, "detach_input": True, "lr": 5e-4
    },
    "anneal, hold 0.8, lambda2 1, detached, lr 3e-4": {
        **ANNEAL, "hold": 0.8, "lambda2": 1.0, "detach_input": True, "lr": 3e-4
    },
    "cut first, distill, lr 5e-4": {**ANNEAL, "hold": 1.0, "lambda2": 0.0, "lr": 5e-4},
    "cut first, distill": {**ANNEAL, "hold": 1.0, "lambda2": 0.0},
    "cut first, distill, lr 2e-3": {**ANNEAL, "hold": 1.0, "lambda2": 0.0, "lr": 2e-3},
    "cut first, distill, hidden 10": {**ANNEAL, "hold": 1.0, "lambda2": 0.0, "hidden": 10.0},
    "cut first, distill, hidden 30": {**ANNEAL, "hold": 1.0, "lambda2": 0.0, "hidden": 30.0},
    "cut first, distill, hidden 30, lr 2e-3": {**ANNEAL, "hold": 1.0, "lambda2": 0.0, "hidden": 30.0, "lr": 2e-3},
    "anneal, hold 0.8, hidden 30": {**ANNEAL, "hold": 0.8, "lambda2": 0.0, "hidden": 30.0},
    "anneal, hold 0.8, lambda2 1, detached, hidden 30": {
        **ANNEAL, "hold": 0.8, "lambda2": 1.0, "detach_input": True, "hidden": 30.0
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("select", "transfer"))
    parser.add_argument("--model", help="default: the built-in model")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--layers", help="for transfer; default: by stage 1 with the defaults")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--only", default="", help="only the rows whose name contains this")
    parser.add_argument("--name", default="demo")
    arguments = parser.parse_args()
    subject = Subject(arguments.model, arguments.data) if arguments.model else Subject.demo()
    dense = subject.cut_perplexity([])
    print(f"dense {dense:.3f}", flush=True)
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        tokens = subject.calibration(arguments.samples, seed)
        if arguments.stage == "select":
            for name, settings in SELECT.items():
                if arguments.only not in name:
                    continue
                layers, cost = subject.chosen(tokens, arguments.count, seed, settings)
                value = subject.cut_perplexity(layers)
                rows.append({"arm": name, "seed": seed, "layers": layers, "perplexity": value, "window_forwards": cost})
                print(f"{name:45} {layers!s:14} {value:8.3f}  {cost} window forwards", flush=True)
            continue
        if arguments.layers:
            layers = [int(part) for part in arguments.layers.split(",")]
        else:
            layers, _ = subject.chosen(tokens, arguments.count, seed, {})
        print(f"layers {layers}: cut {subject.cut_perplexity(layers):.3f}", flush=True)
        for name, settings in TRANSFER.items():
            if arguments.only not in name:
                continue
            result = subject.transferred(tokens, layers, seed, {**settings, "epochs": arguments.epochs})
            rows.append({"arm": name, "seed": seed, "layers": layers, **result})
            print(
                f"{name:50} {result['perplexity_uncut']:8.3f} -> {result['perplexity']:8.3f}  {result['seconds']} s",
                f"D {result['D']}",
                flush=True,
            )
    print(write_results(f"sweep_{arguments.stage}_{arguments.name}", rows, dense=dense, tokens=tokens.numel()))


if __name__ == "__main__":
    main()
