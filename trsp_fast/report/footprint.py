"""What a piece of work takes beside its time: the processor, the most memory, how long the GPU is busy with it."""

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from trsp_fast.engine.memory import peak_bytes

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def processor(device: torch.device) -> str:
    """The GPU's or the CPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def peak_growth(work: Callable[[], None], device: torch.device) -> int | None:
    """The most bytes that `work` needs beyond what is there before it.

    On a GPU what torch has allocated (`max_memory_allocated`), on a CPU the growth of the process's resident set; None
    where the system does not tell (no Linux). Do the work once before: first passes bring mapped weights into memory.
    """
    if device.type == "cuda":
        return peak_bytes(work, device)
    if not _STATUS.exists():
        return None
    # What the allocator keeps of the work before would hide what this one takes.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")  # VmHWM starts anew
    except OSError:
        return None
    before = _resident("VmRSS")
    work()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def busy_seconds(work: Callable[[], None], device: torch.device) -> float | None:
    """How long the GPU computes for `work`, by the profiler's record of its kernels and copies.

    Events around the work would count the gaps in which the GPU waits for the host. None on a CPU, and where the
    profiler is not allowed to see the GPU.
    """
    if device.type != "cuda":
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints its own comings and goings
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize(device)
    results = profile.profiler.kineto_results if profile.profiler else None
    # The raw records: tens of thousands of kernels take minutes as the profiler's own events.
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in (results.events() if results else ())
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]
    return covered(spans) / 1e9 or None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans (start, end): kernels of two streams at one time count once."""
    total, reached = 0.0, -sys.float_info.max
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
