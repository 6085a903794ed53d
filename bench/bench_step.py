"""A step of trsp_fast against the recipe as published on plain transformers (plain_trsp.py): time, FLOPs, memory.

python bench/bench_step.py [--device cuda] [--shapes 1B,7B] [--pairs 3] [--profile] [--json FILE]

Stage 1 of the plain port trains all weights with the gates (the published code), trsp_fast's preset `paper` freezes
them; stage 2 is the same recipe in both. On a CPU the built-in model, on a GPU random Llamas in bf16. The arms run in
turn in one process, `--pairs` times, and every ratio is a median over these pairs; on a CPU they take turns after every
step, so that what else the machine does hits both. Where `--steps` is less than the
recipe has, the rest is counted and extrapolated by the median step of its round. Memory is what a run holds above the
weights at its peak: on a GPU by torch's allocator, the most of all pairs; on a CPU the growth of the resident set
(VmHWM) over that with the model loaded and one forward pass of one token done, each in a process of its own.

No ratio is given where the arms' first losses differ: the weights are equal then, so the losses must be.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import measure
import step_memory
import step_profile
import torch
from safetensors.torch import load_file, save_file
from step_arms import ARMS, SHAPES, Subject, in_turn, run_stage
from step_figures import STAGES, Matmuls, Plan, Run, agree, speedup, stage_flops, stage_seconds, train_seconds
from transformers.utils import logging

from trsp_fast.config import merge, parse_setting

ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}  # the arms' threads allocate as a program of one thread does


def main() -> None:
    arguments = parse()
    logging.disable_progress_bar()
    if arguments.peak:
        arm, part, name, tokens = arguments.peak
        stages = STAGES if part == "whole" else (part,)
        print(step_memory.peak_bytes(arm, stages, make_subject(name, Path(tokens), arguments), changes_of(arguments)))
        return
    content: dict[str, Any] = {
        "machine": measure.machine(arguments.device), "settings": arguments.set, "pairs": arguments.pairs, "rows": [],
    }  # fmt: skip
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            tokens = Path(folder) / "tokens.safetensors"
            save_file({"tokens": make_tokens(name, arguments)}, tokens)
            subject = make_subject(name, tokens, arguments)
            if arguments.profile:
                step_profile.show(subject, arguments.arms, changes_of(arguments))
                continue
            content["rows"] += rows_of(subject, tokens, arguments)
        if arguments.json:
            measure.write(arguments.json, content)
        show(name, [row for row in content["rows"] if row["model"] == name])
    if any(row["agree"] is False for row in content["rows"]):
        sys.exit("first losses differ where they must be equal: there is no ratio for those rows.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help=f"of demo, {', '.join(SHAPES)}; default: demo on a CPU, 1B,7B on a GPU")
    parser.add_argument("--arms", default="plain,ours", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    parser.add_argument("--pairs", type=int, default=3, help="how often the arms run in turn")
    parser.add_argument("--steps", type=int, help="most steps to run of a stage; default: all on a CPU, 24 on a GPU")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--seq", type=int, help="tokens a window; default: 256 (demo), 2048")
    parser.add_argument("--batch", type=int, help="windows a step; default: trsp_fast's (16 and 4) for demo, else 1")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting of trsp_fast's arm"
    )
    parser.add_argument("--profile", action="store_true", help="only show where the time of each arm goes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=4, metavar=("ARM", "PART", "MODEL", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU, and none is visible.")
    arguments.shapes = (arguments.shapes or ("1B,7B" if arguments.device == "cuda" else "demo")).split(",")
    arguments.arms, arguments.stages = arguments.arms.split(","), arguments.stages.split(",")
    arguments.steps = arguments.steps or (24 if arguments.device == "cuda" else sys.maxsize)
    for option, given, known in (("shapes", arguments.shapes, ("demo", *SHAPES)), ("arms", arguments.arms, ARMS),
                                 ("stages", arguments.stages, STAGES)):  # fmt: skip
        for value in given:
            if value not in known:
                parser.error(f"--{option} {value!r}: that is not one of the choices {', '.join(known)}.")
    if "plain" not in arguments.arms:
        parser.error("--arms must have plain: all ratios are to it.")
    return arguments


def make_tokens(name: str, arguments: argparse.Namespace) -> torch.Tensor:
    """Windows of the built-in model's text, random ones for random weights."""
    if name == "demo":
        from arms import Subject as Demo

        return Demo.demo().calibration(arguments.samples, 0)[:, : arguments.seq].contiguous()
    shape = (arguments.samples, arguments.seq or 2048)
    return torch.randint(SHAPES[name]["vocab_size"], shape, generator=torch.Generator().manual_seed(0))


def make_subject(name: str, tokens: Path, arguments: argparse.Namespace) -> Subject:
    batches = {"select": 16, "transfer": 4} if name == "demo" else {"select": 1, "transfer": 1}
    if arguments.batch:
        batches = dict.fromkeys(batches, arguments.batch)
    total = 12 if name == "demo" else SHAPES[name]["num_hidden_layers"]
    rounds = max(1, total // 4)
    # 2 a round: the first step of a run is not counted
    measured = {"select": max(2, arguments.steps // rounds), "transfer": max(2, arguments.steps)}
    plan = Plan(arguments.samples, batches, rounds, measured)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    return Subject(name, arguments.device, dtype, load_file(tokens)["tokens"], plan)


def rows_of(subject: Subject, tokens: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All figures of one model: the pairs, then each arm's peak in its own process."""
    runs: dict[tuple[str, str], list[Run]] = {(arm, stage): [] for arm in arguments.arms for stage in STAGES}
    rates, failed = [], set[tuple[str, str]]()
    sizes = Matmuls.of(subject.fresh())
    for pair in range(arguments.pairs):
        rates.append(matmul_rate(subject.device, subject.dtype))
        # who comes second finds warm caches: the order turns
        arms = arguments.arms if pair % 2 == 0 else arguments.arms[::-1]
        for stage in arguments.stages:
            for arm, run in one_pair([arm for arm in arms if (arm, stage) not in failed], stage, subject, arguments):
                if run is None:
                    failed.add((arm, stage))
                    runs[arm, stage] = []
                else:
                    runs[arm, stage].append(run)
            print(f"{subject.name}: pair {pair + 1}, {stage}", file=sys.stderr, flush=True)
    give_memory_back(subject.device)  # to the processes that measure memory
    rows = []
    for part in (*arguments.stages, *["whole"] * (len(arguments.stages) > 1)):
        agreed = part_agrees(part, runs, arguments.arms, subject.dtype)
        for arm in arguments.arms:
            row = {"model": subject.name, "part": part, "arm": arm, "agree": agreed}
            stages = STAGES if part == "whole" else (part,)
            if failed.intersection((arm, stage) for stage in stages):
                row |= {"problem": "out of memory", "peak_bytes": None}
            else:
                row |= timing_row(part, arm, runs, subject, sizes, rates, agreed)
                row["peak_bytes"] = peak_of(arm, part, runs, subject.name, tokens, arguments)
            rows.append(row)
    with_memory_ratios(rows)
    return rows


def one_pair(
    arms: list[str], stage: str, subject: Subject, arguments: argparse.Namespace
) -> Iterator[tuple[str, Run | None]]:
    """A run of each arm: a step at a time in turn, or (a GPU holds one only) whole; None: out of memory."""
    changes = changes_of(arguments)
    if subject.device != "cuda":
        models = {arm: subject.fresh() for arm in arms}
        calls = {arm: partial(run_stage, arm, stage, models[arm], subject, changes) for arm in arms}
        yield from in_turn(calls).items()
        return
    for arm in arms:
        give_memory_back(subject.device)
        try:
            yield arm, run_stage(arm, stage, subject.fresh(), subject, changes)
        except torch.OutOfMemoryError:
            yield arm, None


def give_memory_back(device: str) -> None:
    """What a run before this one left, also where it ran out of memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def changes_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return merge(*map(parse_setting, arguments.set))


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square matmul: what a step could reach at best."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / measure.interleaved({"matmul": lambda: a @ b}, device, 0.5)["matmul"].median


def part_agrees(part: str, runs: dict[tuple[str, str], list[Run]], arms: list[str], dtype: torch.dtype) -> bool:
    stages = STAGES if part == "whole" else (part,)
    return all(agree([run.losses[0] for arm in arms for run in runs[arm, stage]] or [0.0], dtype) for stage in stages)


def timing_row(
    part: str,
    arm: str,
    runs: dict[tuple[str, str], list[Run]],
    subject: Subject,
    sizes: Matmuls,
    rates: list[float],
    agreed: bool,
) -> dict[str, Any]:
    """Medians over the pairs. `cpu_ratio` is the same of the processors' time, which other programs disturb less."""
    plan, seq = subject.plan, subject.tokens.shape[1]
    stages = STAGES if part == "whole" else (part,)

    def totals(of: str, clock: int = 0, *, calls: bool = part == "whole") -> list[float]:
        per_stage = [
            [stage_seconds(r, plan, stage) if calls else train_seconds(r, plan, stage, clock) for r in runs[of, stage]]
            for stage in stages
        ]
        return [sum(values) for values in zip(*per_stage, strict=True)]

    counted = sum(sum(plan.counted_steps(stage)) for stage in stages)
    measured = sum(sum(plan.measured_steps(stage)) for stage in stages)
    all_weights = arm in ("plain", "ours-all-weights")
    flops = sum(stage_flops(sizes, plan, s, seq, weights=s == "transfer" or all_weights) for s in stages)
    seconds = totals(arm)
    middle = statistics.median(seconds)
    pairs = len(totals("plain")) == len(seconds)
    return {
        "seconds": middle,
        "step_ms": middle / counted * 1e3,
        "tokens_per_s": sum(plan.samples * seq * (plan.rounds if s == "select" else 1) for s in stages) / middle,
        "matmul_gflops": statistics.median(rates) / 1e9,
        "mfu": statistics.median(flops / s / rate for s, rate in zip(seconds, rates, strict=True)),
        "measured_steps": measured,
        "counted_steps": counted,
        "extrapolated": measured < counted,
        "first_loss": runs[arm, stages[0]][0].losses[0],
        "pairs_seconds": seconds,
        "ratio": speedup(totals("plain"), seconds, agreed) if pairs else None,
        "cpu_ratio": speedup(totals("plain", 1, calls=False), totals(arm, 1, calls=False), agreed) if pairs else None,
    }


def with_memory_ratios(rows: list[dict[str, Any]]) -> None:
    """Each arm's peak as a share of the plain port's; None without agreement or where one did not run."""
    plain = {row["part"]: row["peak_bytes"] for row in rows if row["arm"] == "plain"}
    for row in rows:
        both = row["peak_bytes"] and plain[row["part"]] and row["agree"]
        row["memory_ratio"] = row["peak_bytes"] / plain[row["part"]] if both else None


def peak_of(
    arm: str, part: str, runs: dict[tuple[str, str], list[Run]], name: str, tokens: Path, arguments: argparse.Namespace
) -> int | None:
    """What a GPU's allocator told of the runs; on a CPU `step_memory.peak_bytes` in a process of its own.

    None where it ran out of memory.
    """
    if arguments.device == "cuda":
        stages = STAGES if part == "whole" else (part,)
        return max(run.peak_bytes or 0 for stage in stages for run in runs[arm, stage])
    command = [sys.executable, __file__, "--device", arguments.device, "--samples", str(arguments.samples)]
    command += [option for setting in arguments.set for option in ("--set", setting)]
    command += ["--batch", str(arguments.batch)] if arguments.batch else []
    # Adam's state is there from the second step on, and a round has no more than the one before it.
    command += ["--steps", str(min(arguments.steps, 8)), "--peak", arm, part, name, str(tokens)]
    print(f"{name}: peak, {part}, {arm}", file=sys.stderr, flush=True)
    done = subprocess.run(command, env=os.environ | ONE_ARENA, capture_output=True, text=True, check=False)
    if done.returncode and "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        sys.exit(f"the run of {arm} for its memory failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def show(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{name}: medians of interleaved pairs; x: times the plain port's speed, in wall (and processor) time")
    print(f"{'part':9} {'arm':17} {'s':>8} {'ms/step':>9} {'tok/s':>8} {'MFU':>5} {'x':>6} {'(cpu)':>7} "
          f"{'MB above weights':>17} {'of plain':>8}  steps")  # fmt: skip
    figures = [row for row in rows if "problem" not in row]
    for row in rows:
        head, memory = f"{row['part']:9} {row['arm']:17}", row["peak_bytes"]
        if "problem" in row:
            print(head, row["problem"])
            continue
        steps = f"{row['counted_steps']}"
        if row["extrapolated"]:
            steps += f", extrapolated from {row['measured_steps']}"
        steps += f" (x {len(row['pairs_seconds'])})"
        print(
            head, f"{row['seconds']:8.1f} {row['step_ms']:9.1f} {row['tokens_per_s']:8.0f} {row['mfu']:5.0%}",
            f"{_or_dash(row['ratio'], '6.2f', row['agree'])} {_or_dash(row['cpu_ratio'], '7.2f', row['agree'])}",
            f"{memory / 1e6 if memory is not None else float('nan'):17.0f}",
            f"{_or_dash(row['memory_ratio'], '8.2f', row['agree'])}  {steps}",
        )  # fmt: skip
    if figures:
        print(f"MFU: FLOPs that the arm needs (step_figures.step_flops), of a matmul's "
              f"{figures[0]['matmul_gflops']:.0f} GFLOPS in this process.")  # fmt: skip


def _or_dash(value: float | None, form: str, agreed: bool) -> str:
    width = int(form.split(".")[0])
    return f"{'-' if agreed else 'differ':>{width}}" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    measure.set_allocator(ONE_ARENA)
    main()
