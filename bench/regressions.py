"""A pytest-benchmark suite of the fused ops, to see a change of speed between two commits: `make bench`.

Figures of one machine at one hour; bench_gated_residual.py is the one that compares and publishes.
"""

import time

import pytest
import torch
from op_cases import CASES, DTYPES, PASSES, Problem, call

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(16384, 4096), (2048, 2560)] if DEVICE == "cuda" else [(512, 2048)]


def synchronised() -> float:
    """The clock once the device has caught up: pytest-benchmark times the host."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(timer=synchronised, warmup=True, min_rounds=7, max_time=0.3)
@pytest.mark.parametrize("provider", ["eager", "ours"])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("case", CASES)
def test_op(benchmark, case, size, dtype, which, provider):
    problem = Problem.make(CASES[case], *size, DTYPES[dtype], DEVICE)
    function = call(provider, problem.case)
    inputs = (problem.x, problem.out, problem.gate)
    outputs = function(*inputs)
    benchmark.group = f"{size[0]} x {size[1]} {dtype}, {case}, {which}"
    benchmark(
        {
            "forward": lambda: function(*inputs),
            "backward": lambda: problem.backward(outputs, again=True),
            "both": lambda: problem.backward(function(*inputs)),
        }[which]
    )
    if benchmark.stats is not None:  # None under --benchmark-disable
        moved = problem.x.numel() * problem.x.element_size() * problem.case.moves(which)
        benchmark.extra_info["bytes"] = moved
        benchmark.extra_info["gb_per_s"] = moved / benchmark.stats.stats.median / 1e9
        benchmark.extra_info["versions"] = {"torch": torch.__version__, "device": DEVICE}
