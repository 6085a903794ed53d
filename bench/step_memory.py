"""The memory of one run on a CPU in a process of its own: bench_step.py starts it."""

import contextlib
import ctypes
import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from step_arms import Subject, run_stage


def peak_bytes(arm: str, stages: Iterable[str], subject: Subject, changes: dict[str, Any]) -> int:
    """The most bytes that this process holds above the loaded weights while `stages` run."""
    model = subject.fresh()
    with torch.no_grad():
        model(input_ids=subject.tokens[:1, :1], use_cache=False)
    # The first optimiser of a process imports much that is nobody's working memory.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()
    subject.forget()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # then VmHWM is that of loading, if that was more
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _resident("VmRSS")
    for stage in stages:
        run_stage(arm, stage, model, subject, changes)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) << 10
