"""What a run would take, found out by doing a little of it: steps, tokens, memory, minutes, disk."""

import contextlib
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig, merge
from trsp_fast.engine.optimizers import STATE_BYTES
from trsp_fast.engine.session import Session
from trsp_fast.errors import UserError
from trsp_fast.models.checkpoint import resolve_device
from trsp_fast.models.families import check_set, layer_stack
from trsp_fast.models.offload import placed
from trsp_fast.report.perplexity import perplexity
from trsp_fast.report.speed import REPEATS, seconds_of_a_round
from trsp_fast.run.events import Events
from trsp_fast.run.state import KEPT
from trsp_fast.select import choose_layers
from trsp_fast.select.contract import candidates
from trsp_fast.select.race import FIRST
from trsp_fast.select.stand_in import fitted_windows
from trsp_fast.select.trsp import BATCH
from trsp_fast.transfer import require_room, trained_weights, transfer

PROBED = 3  # steps of each kind; the first one is slower and does not count
PROBED_WINDOWS = 16  # of the evaluation, to know a forward pass
LOOKS = 0.5  # of the earlier choices that are looked at again, at most on the models that were measured on the whole
CLOSE = 3  # in a second look at an earlier choice: the layer itself and about two that were close to being chosen
PIECE = 0.55  # of a pass that a bypassed candidate takes, where what lies below it ran once for all


@dataclass(frozen=True)
class Forecast:
    """What a run of `prune` would take.

    steps, tokens, seconds: by part of the run. memory: bytes by stage and by what needs them, the weights apart.
    micro_batch: windows in one pass, by stage. disk: bytes of the checkpoint and of the states that are kept meanwhile.
    """

    removed: int
    layers: int
    steps: dict[str, int]
    tokens: dict[str, int]
    seconds: dict[str, float]
    memory: dict[str, Any]
    micro_batch: dict[str, int]
    disk: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds_in_all": sum(self.seconds.values())}


def forecast(model: PreTrainedModel, tokens: Tensor, config: TRSPConfig, evaluation: Tensor | None = None) -> Forecast:
    """Probe a run: a few steps of each stage, a few windows of the evaluation, one generation.

    Args:
        model: in the dtype and on the device of the run (with `run.offload` on the host); a few steps of stage 2 change
            its weights.
        tokens: calibration windows, int64 `[samples, seq]`.

    Raises:
        UserError: what `prune` would refuse.
    """
    total = len(layer_stack(model))
    count = config.layer_count(total)
    if config.layers:
        check_set(model.config.to_dict(), list(config.layers))
    if count > len(candidates(model, config)):
        raise UserError(f"{count} layers are to go, but only {len(candidates(model, config))} of {total} may go.")
    layers = list(config.layers or candidates(model, config)[-count:])
    with placed(model, config):
        forward = _seconds_of_a_window(model, tokens if evaluation is None else evaluation)
    plans: dict[str, Any] = {}
    steps: dict[str, int] = {}
    seconds = {"evaluation": 0.0 if evaluation is None else forward * len(evaluation) * (4 - 2 * count / total)}
    if not config.layers:
        seconds["stage 1"], steps["stage 1"] = _stage_1(model, tokens, config, count, forward, plans)
    if config.transfer.happens:
        seconds["stage 2"], steps["stage 2"] = _stage_2(model, tokens, layers, config, plans)
        passes = 2 * (1 - count / total) + 1  # of the shorter model, and of the untouched one for its states
        seconds["stage 2"] += passes * forward * len(tokens) if config.transfer.folds else 0.0
    rounds = (REPEATS + 1) * (2 - count / total) + 1  # of both models, and about one for the proof
    with contextlib.nullcontext() if config.transfer.happens else placed(model, config):
        seconds["speed and proof"] = seconds_of_a_round(model) * rounds
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gone = sum(p.nbytes for layer in layers for p in layer_stack(model).layers[layer].parameters())
    return Forecast(
        removed=count,
        layers=total,
        steps=steps,
        tokens={name: number * _batch(config, name) * tokens.shape[1] for name, number in steps.items()},
        seconds={name: round(value, 1) for name, value in seconds.items()},
        memory={"weights": weights, **{name: plan["parts"] for name, plan in plans.items()}},
        micro_batch={name: plan["micro_batch"] for name, plan in plans.items()},
        disk={"checkpoint": weights - gone, "states": (KEPT + 1) * _bytes_of_a_state(model, layers, config)},
    )


def _bytes_of_a_state(model: PreTrainedModel, layers: list[int], config: TRSPConfig) -> int:
    """fp32 weights and moments of the stage that trains more; one more than are kept is there while it is written."""
    stage_1, stage_2 = 0, 0
    if config.select.train_weights and not config.layers:
        stage_1 = 12 * sum(parameter.numel() for parameter in model.parameters())
    if config.transfer.passes:
        trained = sum(p.numel() for p in trained_weights(model, layers, config.transfer).values())
        stage_2 = round((4 + STATE_BYTES[config.transfer.optimizer]) * trained)
        stage_2 += sum(parameter.nbytes for parameter in model.parameters()) if stage_1 else 0  # as stage 1 left them
    return max(stage_1, stage_2)


class _EnoughError(Exception):
    """Ends a stage whose time per step is known."""


def _seconds_per_step(kind: str, stage: str, plans: dict[str, Any], run: Any) -> float:
    """From the end of the first step to the end of the last one that is probed."""
    times: list[float] = []

    def listen(event: str, values: dict[str, Any]) -> None:
        if event == "plan":
            plans.setdefault(stage, values)
        if event == kind:
            times.append(time.perf_counter())
            if len(times) > PROBED:
                raise _EnoughError

    began = time.perf_counter()
    with contextlib.suppress(_EnoughError):
        run(Session(Events(listen)))
    if len(times) < 2:
        return time.perf_counter() - began
    return (times[-1] - times[0]) / (len(times) - 1)


def _stage_1(
    model: PreTrainedModel, tokens: Tensor, config: TRSPConfig, count: int, forward: float, plans: dict[str, Any]
) -> tuple[float, int]:
    """Seconds and steps; each round has one layer fewer, and races its shortlist."""
    total, settings = len(layer_stack(model)), config.select
    tokens = tokens[: settings.samples or None]
    alive = [total - index for index in range(1 if settings.schedule == "oneshot" else count)]
    if settings.method != "trsp":
        known = {"sleb": PIECE * sum(alive), "shortened": PIECE * total, "shortgpt": 1.0, "angular": 1.0}
        passes = known.get(settings.method, 0.0)
        return forward * len(tokens) * passes, 0
    per_round = settings.steps_per_round or math.ceil(len(tokens) / (config.data.batch or BATCH))
    select = replace(settings, steps_per_round=PROBED + 1, shortlist=0)  # no race between the steps
    probe = replace(config, select=select)
    step = _seconds_per_step(
        "select_step", "stage 1", plans, lambda session: choose_layers(model, tokens, probe, session=session)
    )
    fitted = fitted_windows(len(tokens)) if settings.judge == "fold" else 0
    work = [
        step * per_round + forward * _raced(len(tokens) - fitted, min(settings.shortlist, n), fitted) for n in alive
    ]
    shares = [_share(model, number) for number in alive]
    seconds = sum(share * one for share, one in zip(shares, work, strict=True))
    if settings.exchange and settings.shortlist > 1 and settings.schedule == "iterative":
        looks = LOOKS * (count - 1) * (fitted * count + CLOSE * PIECE * (len(tokens) - fitted))
        seconds += shares[-1] * forward * looks
    return seconds, per_round * len(alive)


def _raced(windows: int, candidates: int, fitted: int) -> float:
    """Passes of one window: the fold's, the first heat of all, about one of all windows for those that lie close."""
    return fitted + min(windows, FIRST) * candidates * PIECE + windows if candidates > 1 else 0.0


def _stage_2(
    model: PreTrainedModel, tokens: Tensor, layers: list[int], config: TRSPConfig, plans: dict[str, Any]
) -> tuple[float, int]:
    """Seconds and steps; where gates are annealed, steps with and without the layers are probed apart."""
    settings, batch = config.transfer, _batch(config, "stage 2")
    if config.run.offload != "none":
        device = resolve_device(config.device)
        require_room(model, layers, settings, device)
        model.to(device)
    steps = settings.passes * math.ceil(len(tokens) / batch)
    if not steps:
        return 0.0, 0

    def probe(changes: dict[str, Any]) -> float:
        own = TRSPConfig.from_dict(merge(config.to_dict(), {"transfer": {**changes, "lr": 0.0, "fold": "none"}}))
        return _seconds_per_step(
            "transfer_step", "stage 2", plans, lambda session: transfer(model, tokens, layers, own, session=session)
        )

    if settings.gate == "none":
        return probe({}) * steps, steps
    falling = (
        (1 - settings.hold) * probe({"hold": 0.0, "epochs": max(settings.epochs, 2)}) if settings.hold < 1 else 0.0
    )
    return (falling + settings.hold * probe({"hold": 1.0})) * steps, steps


def _batch(config: TRSPConfig, stage: str) -> int:
    from trsp_fast.transfer import BATCH as SMALL_BATCH

    return config.data.batch or (BATCH if stage == "stage 1" else SMALL_BATCH)


def _share(model: PreTrainedModel, alive: int) -> float:
    """The work of a step with so many layers, as a share of that with all: matrices decide it, the head's too."""
    layers = layer_stack(model).layers
    inside = sum(p.numel() for layer in layers for p in layer.parameters())
    head = model.get_output_embeddings()
    outside = head.weight.numel() if head is not None else 0
    return (outside + inside * alive / len(layers)) / (outside + inside)


@torch.no_grad()
def _seconds_of_a_window(model: PreTrainedModel, tokens: Tensor) -> float:
    tokens = tokens[:PROBED_WINDOWS]
    perplexity(model, tokens[:1])
    began = time.perf_counter()
    perplexity(model, tokens)
    return (time.perf_counter() - began) / len(tokens)
