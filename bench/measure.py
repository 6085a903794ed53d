"""How the benchmarks measure: the providers of one shape in turn in one process, medians, a copy beside them."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"

# Bytes per second of device memory by NVIDIA's datasheets, the longest matching name first.
DATASHEET = {"H200": 4.8e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "B200": 8.0e12, "A100-SXM4-80GB": 2.039e12}
FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU above
# glibc's settings. It then keeps freed memory, as CUDA's caching allocator does, or gives it back after every call; by
# default it does one below 32 MB and the other above, and page faults would be most of some providers' time.
FRESH_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    p20: float
    p80: float
    calls: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        ordered = sorted(seconds)
        at = [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]
        return cls(statistics.median(ordered), *at, len(ordered))


def set_allocator(wanted: dict[str, str]) -> None:
    """Start this program again with these settings, unless it was: glibc reads them before Python runs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")} != wanted:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], kept | wanted)


def interleaved(functions: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, Timing]:
    """Time every function in turn, again and again for about `seconds`: a slow moment of the machine hits them all."""
    time_one = _time_on_gpu if device == "cuda" else _time_on_cpu
    for function in functions.values():  # compiles, allocates, fills the caches of the allocator
        for _ in range(3):
            function()
    taken: dict[str, list[Any]] = {name: [] for name in functions}
    deadline = time.perf_counter() + seconds
    while len(next(iter(taken.values()))) < 7 or time.perf_counter() < deadline:
        for name, function in functions.items():
            taken[name].append(time_one(function))
        if len(taken[name]) >= 200:
            break
    if device == "cuda":
        torch.cuda.synchronize()
        taken = {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in taken.items()}
    return {name: Timing.of(values) for name, values in taken.items()}


def _time_on_cpu(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


_flush: list[torch.Tensor] = []


def _time_on_gpu(function: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events around one call on a cold L2. The flush keeps the device busy while the host queues the call."""
    if not _flush:
        _flush.append(torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda"))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _flush[0].zero_()
    start.record()
    function()
    end.record()
    return start, end


def as_graph(function: Callable[[], Any]) -> Callable[[], None]:
    """The function as one replay of a CUDA graph: for shapes whose launches take longer than their work.

    It is captured on the current stream, which must not be the default one: a backward pass runs on the stream of its
    forward pass, and a capture must not wait for another stream.
    """
    for _ in range(3):
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = function()

    def replay() -> None:
        graph.replay()

    replay.results = kept  # type: ignore[attr-defined]  # the graph writes into them
    return replay


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """The most memory that one call holds beyond what was there before it."""
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints its own comings and goings
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]  # it ran above
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], Any], inputs: list[torch.Tensor]) -> int:
    """What autograd keeps for the backward pass, the inputs themselves not counted."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    for tensor in inputs:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def datasheet(device: str) -> float | None:
    """Bytes per second that the vendor names for this GPU; None for a CPU or a GPU that is not listed."""
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in DATASHEET.items() if part in name), None)


def machine(device: str) -> dict[str, Any]:
    """What a figure must name to mean anything: the hardware and the versions."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }
    if device == "cuda":
        import triton

        facts |= {"triton": triton.__version__, "cuda": torch.version.cuda}
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def write(path: Path, content: dict[str, Any]) -> None:
    """Put the results down at once, a row per line; a run that is stopped has written what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    rows = ",\n  ".join(json.dumps({name: _rounded(value) for name, value in row.items()}) for row in content["rows"])
    head = json.dumps({name: value for name, value in content.items() if name != "rows"}, indent=1).removesuffix("\n}")
    partial.write_text(f'{head},\n "rows": [\n  {rows}\n ]\n}}\n')
    partial.replace(path)


def _rounded(value: Any) -> Any:
    """Five digits of a figure: more are noise."""
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
