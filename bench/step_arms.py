"""The arms of bench_step.py and what they run on."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import plain_trsp
import torch
from step_figures import Plan, Run
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from trsp_fast.config import TRSPConfig, merge
from trsp_fast.data import demo_model
from trsp_fast.models.checkpoint import load_model
from trsp_fast.run.events import Events
from trsp_fast.select import choose_layers
from trsp_fast.transfer import transfer

# Random Llamas of the published sizes, and one that a test can run.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 256},
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32000},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 40, "vocab_size": 32000},
}  # fmt: skip
ARMS = ("plain", "ours", "ours-compiled", "ours-all-weights")


@dataclass(frozen=True)
class Subject:
    """A model that can be had afresh as often as wanted, and its calibration windows."""

    name: str
    device: str
    dtype: torch.dtype
    tokens: Tensor
    plan: Plan
    _kept: list[PreTrainedModel] = field(default_factory=list)

    def fresh(self) -> PreTrainedModel:
        """The same weights every time; random ones are drawn anew, since a second copy would not fit beside them."""
        if self.name == "demo":
            if not self._kept:
                self._kept.append(load_model(str(demo_model()), dtype="float32", device=self.device))
            return copy.deepcopy(self._kept[0])
        return random_llama(self.name, self.device, self.dtype, self.tokens.shape[1])

    def forget(self) -> None:
        """Give back the copy that `fresh` copies from."""
        self._kept.clear()

    @property
    def layers(self) -> list[int]:
        """What stage 2 moves out in every arm: evenly spread, so that its work does not hang on stage 1."""
        total = LlamaConfig.from_pretrained(demo_model()) if self.name == "demo" else LlamaConfig(**SHAPES[self.name])
        return list(range(1, total.num_hidden_layers, 4))[: self.plan.rounds]


def random_llama(shape: str, device: str, dtype: torch.dtype, context: int) -> PreTrainedModel:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=context)).eval()
    finally:
        torch.set_default_dtype(before)


def run_stage(
    arm: str,
    stage: str,
    model: PreTrainedModel,
    subject: Subject,
    changes: dict[str, Any],
    hand_over: Callable[[], None] | None = None,
) -> Run:
    """Run the measured steps of one stage on `model`, in place.

    Args:
        changes: nested settings of trsp_fast on top of the preset `paper`.
        hand_over: see `Run`.
    """
    plan, run = subject.plan, Run(hand_over)
    steps = plan.measured_steps(stage)[0]
    tokens = subject.tokens if stage == "select" else subject.tokens[: steps * plan.batches[stage]]
    call = _plain if arm == "plain" else _ours
    on_gpu = subject.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    run.start()
    call(arm, stage, model, tokens, subject, steps, run, changes)
    if on_gpu:
        torch.cuda.synchronize()
        run.peak_bytes = torch.cuda.max_memory_allocated() - before
    run.finish()
    return run


def _plain(
    _arm: str, stage: str, model: PreTrainedModel, tokens: Tensor, subject: Subject, steps: int, run: Run, _changes: Any
) -> None:
    """fp32 weights under autocast, which is how trsp_fast trains too; the cast is part of the run."""
    plan, amp = subject.plan, None if subject.dtype == torch.float32 else subject.dtype
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    common: dict[str, Any] = {"batch": plan.batches[stage], "seed": plan.seed, "amp": amp, "on_step": run.step_done}
    if stage == "select":
        plain_trsp.select(model, tokens, plan.rounds, steps_per_round=steps, **common)
    else:
        plain_trsp.transfer(model, tokens, subject.layers, **common)


def _ours(
    arm: str,
    stage: str,
    model: PreTrainedModel,
    tokens: Tensor,
    subject: Subject,
    steps: int,
    run: Run,
    changes: dict[str, Any],
) -> None:
    def listen(kind: str, values: dict[str, Any]) -> None:
        if kind == f"{stage}_step":
            run.step_done(values["loss"])

    plan = subject.plan
    recipe = {
        "num_layers": plan.rounds,
        "seed": plan.seed,
        "data": {"batch": plan.batches[stage]},
        "select": {"steps_per_round": steps, "train_weights": arm == "ours-all-weights"},
        "run": {"compile": arm == "ours-compiled"},
    }
    config = TRSPConfig.from_preset("paper", **merge(recipe, changes))
    if stage == "select":
        choose_layers(model, tokens, config, Events(listen))
    else:
        transfer(model, tokens, subject.layers, config, Events(listen))


def in_turn(calls: dict[str, Callable[[Callable[[], None]], Run]]) -> dict[str, Run]:
    """All runs, a step of each at a time: what slows the machine down for a second hits them all.

    Args:
        calls: each is given what it must call between steps.
    """
    turns = {name: threading.Semaphore(0) for name in calls}

    def after(name: str) -> threading.Semaphore:
        order = list(turns)
        return turns[order[(order.index(name) + 1) % len(order)]]

    def hand_over(name: str) -> None:
        after(name).release()
        turns[name].acquire()

    def whole(name: str) -> Run:
        turns[name].acquire()
        try:
            return calls[name](lambda: hand_over(name))
        finally:
            following = after(name)
            del turns[name]
            following.release()

    with ThreadPoolExecutor(len(calls)) as threads:
        futures = {name: threads.submit(whole, name) for name in calls}
        turns[next(iter(calls))].release()
        return {name: future.result() for name, future in futures.items()}
