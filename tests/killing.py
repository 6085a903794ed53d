"""Runs prune in a process of its own and kills that process at a chosen moment, as a power cut would."""

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from subprocess import Popen

KINDS = ("event", "write", "fsync", "rename", "unlink")

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["killing", "tiny", "trsp_fast.pruner", "transformers.models.llama.modeling_llama"])


def prune(out: Path, settings: dict, kill: tuple[str, int] | None = None, counts: str | None = None) -> int:
    """Exit code of the process; -9 where it was killed at the n-th call of a kind. `counts` is a file for the calls."""
    process = context.Process(target=_work, args=(out, settings, kill, counts))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def kill_points(counts: Counter, seed: int, number: int) -> list[tuple[str, int]]:
    """`number` moments spread over the kinds, drawn by a seed."""
    draw = random.Random(seed)
    return [(kind, draw.randint(1, counts[kind])) for kind in (KINDS * number)[:number]]


def wait_for_a_step(process: Popen, out: Path) -> Path:
    """Until a run in a process records its first step of stage 2; the record.

    Nothing is kept of the fold before it.
    """
    record = out.with_name(f".{out.name}.unfinished") / ".trsp" / "events.jsonl"
    while process.poll() is None and not (record.exists() and '"transfer_step"' in record.read_text()):
        time.sleep(0.1)
    return record


def _work(out: Path, settings: dict, kill: tuple[str, int] | None, counts: str | None) -> None:
    import torch
    from tiny import tiny_llama

    import trsp_fast as trsp
    from trsp_fast import pruner
    from trsp_fast.run.events import Events

    torch.set_num_threads(1)
    moments = _Moments(kill)
    moments.watch()
    # Speed is no part of what is compared, and takes longest.
    pruner.measure_speed = lambda models: {
        name: {"prompt_tokens_per_second": 1.0, "generated_tokens_per_second": 1.0, "parameters": 1} for name in models
    }
    tokens = torch.randint(0, 97, (8, 16), generator=torch.Generator().manual_seed(1))
    events = Events(lambda _kind, _values: moments.come("event"))
    config = trsp.TRSPConfig.from_dict(settings)
    trsp.prune(tiny_llama(), tokens, config, out=out, evaluation=tokens[:2], events=events, resume=True)
    if counts:
        Path(counts).write_text(repr(dict(moments.seen)))


class _Moments:
    """Counts calls of a kind and ends the process at the chosen one, a write half done."""

    def __init__(self, kill: tuple[str, int] | None) -> None:
        self.kill, self.seen = kill, Counter()

    def come(self, kind: str) -> None:
        self.seen[kind] += 1
        if self.kill == (kind, self.seen[kind]):
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        import safetensors.torch

        for name in ("fsync", "rename", "unlink"):
            setattr(os, name, self._before(name, getattr(os, name)))
        original = safetensors.torch.save_file

        def save_file(tensors: dict, path: Path, *rest: object) -> None:
            original(tensors, path, *rest)
            if self.kill == ("write", self.seen["write"] + 1):
                os.truncate(path, os.path.getsize(path) // 2)
            self.come("write")

        safetensors.torch.save_file = save_file

    def _before(self, name: str, original):
        def call(*arguments, **options):
            self.come(name)
            return original(*arguments, **options)

        return call
