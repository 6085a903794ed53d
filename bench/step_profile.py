"""Where the time and the memory of a step go, by torch.profiler: bench_step.py --profile."""

import dataclasses
import os
from typing import Any

import torch
from step_arms import Subject, run_stage
from step_figures import STAGES

STEPS, OPS = 3, 14


def show(subject: Subject, arms: list[str], changes: dict[str, Any]) -> None:
    """Print the ops that most of each arm's own time goes to, over the steps of each stage that follow its first.

    MB is what an op itself takes less what it gives back, so a backward op that frees its inputs is below 0.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints its own comings and goings
    activities, on = [torch.profiler.ProfilerActivity.CPU], "cpu"
    if subject.device == "cuda":
        activities, on = [*activities, torch.profiler.ProfilerActivity.CUDA], "device"
    plan = dataclasses.replace(subject.plan, rounds=1, measured=dict.fromkeys(STAGES, STEPS + 2))
    few = dataclasses.replace(subject, plan=plan)
    for stage in STAGES:
        for arm in arms:
            model = subject.fresh()
            profile = torch.profiler.profile(activities=activities, profile_memory=True)
            between = iter([profile.start, *[_nothing] * (STEPS - 1), profile.stop, _nothing])
            run_stage(arm, stage, model, few, changes, lambda between=between: next(between)())
            rows = [(getattr(event, f"self_{on}_time_total") / 1e3 / STEPS, event) for event in profile.key_averages()]
            total = sum(time for time, _ in rows)
            print(f"\n{subject.name}, {stage}, {arm}: {total:.0f} ms a step in ops")
            for time, event in sorted(rows, key=lambda row: -row[0])[:OPS]:
                taken = getattr(event, f"self_{on}_memory_usage") / 1e6 / STEPS
                print(f"{time / total:7.1%} {time:9.1f} ms {event.count / STEPS:7.0f} calls {taken:9.1f} MB"
                      f"  {event.key[:70]}")  # fmt: skip


def _nothing() -> None:
    pass
