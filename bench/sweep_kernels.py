"""Which tile, number of warps and eviction policy the Triton kernels should use, measured on this GPU.

python bench/sweep_kernels.py [--json FILE]

Every setting runs in turn in one process, for each size and pass; the winner has the least geometric mean of time over
that of the setting in use. With TRITON_INTERPRET=1 and --device cpu it only proves that every setting runs.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from op_cases import CASES, Problem, call

from trsp_fast.kernels import residual_norms
from trsp_fast.ops import available_backends

CHOSEN = (residual_norms.TILE, residual_norms.WARPS, residual_norms.EVICTION)
WITHOUT_SUMS = (residual_norms.TILE_WITHOUT_SUMS, residual_norms.WARPS_WITHOUT_SUMS)
IN_USE = "in use"
SETTINGS = [
    *itertools.product((2048, 4096, 8192), (4, 8), ("",)),
    *itertools.product((8192, 16384), (16,), ("",)),
    *((*CHOSEN[:2], eviction) for eviction in ("evict_first", "evict_last")),
]
SWEPT = ("output, penalty", "residual, penalty", "norms only", "residual, no norms, frozen gate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--sizes", default="16384x4096,65536x4096,4096x2560")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per case, size and pass")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    # Asked of the device, not of the backends alone: a machine without a GPU knows how to run a CUDA tensor too.
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("a CUDA GPU is needed, and none is visible.")
    if "triton" not in available_backends(arguments.device):
        parser.error("on a CPU this needs TRITON_INTERPRET=1, and then says nothing about speed.")
    content: dict[str, Any] = {"machine": measure.machine(arguments.device), "rows": []}
    for size in arguments.sizes.split(","):
        tokens, hidden = map(int, size.split("x"))
        for case in SWEPT:
            problem = Problem.make(CASES[case], tokens, hidden, torch.bfloat16, arguments.device)
            for which, functions in passes(problem).items():
                timings = measure.interleaved(functions, arguments.device, arguments.seconds)
                content["rows"] += [
                    {"case": case, "tokens": tokens, "hidden": hidden, "pass": which, "setting": name,
                     "median_ms": timing.median * 1e3, "p20_ms": timing.p20 * 1e3, "p80_ms": timing.p80 * 1e3}
                    for name, timing in timings.items()
                ]  # fmt: skip
            if arguments.json:
                measure.write(arguments.json, content)
    ranking = rank(content["rows"])
    for name, share in ranking:
        print(f"{share:7.4f} of the time of the setting in use   {name}")
    tile, warps = WITHOUT_SUMS
    print(f"In use: {label(CHOSEN)}; without sums tile {tile}, {warps} warps", file=sys.stderr)


def label(setting: tuple[int, int, str]) -> str:
    tile, warps, eviction = setting
    return f"tile {tile}, {warps} warps, {eviction or 'default'} eviction"


def passes(problem: Problem) -> dict[str, dict[str, Callable[[], Any]]]:
    """Pass -> setting -> the function to time."""
    function, inputs = call("triton", problem.case), (problem.x, problem.out, problem.gate)
    outputs = function(*inputs)

    def under(setting: tuple[int, int, str], work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            use(setting, setting[:2])
            try:
                return work()
            finally:
                use(CHOSEN, WITHOUT_SUMS)

        return run

    works = {"forward": lambda: function(*inputs), "backward": lambda: problem.backward(outputs, again=True)}
    return {which: {IN_USE: work, **{label(s): under(s, work) for s in SETTINGS}} for which, work in works.items()}


def use(setting: tuple[int, int, str], without: tuple[int, int]) -> None:
    """Every kernel is launched with these constants from now on; `without`: tile and warps where no sums are made."""
    residual_norms.TILE, residual_norms.WARPS, residual_norms.EVICTION = setting
    residual_norms.TILE_WITHOUT_SUMS, residual_norms.WARPS_WITHOUT_SUMS = without


def rank(rows: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Settings by the geometric mean of their time over that of the setting in use."""
    logs: dict[str, list[float]] = {}
    key = ("case", "tokens", "hidden", "pass")
    in_use = {tuple(row[k] for k in key): row["median_ms"] for row in rows if row["setting"] == IN_USE}
    for row in rows:
        share = row["median_ms"] / in_use[tuple(row[k] for k in key)]
        logs.setdefault(row["setting"], []).append(math.log(share))
    means = [(name, math.exp(sum(values) / len(values))) for name, values in logs.items()]
    return sorted(means, key=lambda pair: pair[1])


if __name__ == "__main__":
    main()
