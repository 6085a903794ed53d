"""Stage 2 of TRSP (arXiv 2505.18232, section 3.3): move the knowledge of the chosen layers into those that stay."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp_fast.config import TransferConfig, TRSPConfig
from trsp_fast.engine.objective import distillation_loss, epochs_of_batches
from trsp_fast.engine.precision import fp32_weights
from trsp_fast.errors import CheckFailed
from trsp_fast.models.gates import LayerGates
from trsp_fast.run.events import Events

BATCH = 4  # windows a step by default: many small steps, since few tokens are spent


def transfer(
    model: PreTrainedModel, tokens: Tensor, layers: Sequence[int], config: TRSPConfig, events: Events | None = None
) -> list[dict[str, Any]]:
    """Train the model's weights in place so that `layers` can go: loss + lambda2 * sum of D over `layers`.

    Starts with every layer on. Weights of a lower precision than fp32 are trained as fp32 copies under autocast and
    come back in their dtype. Dropout stays off: the tokens are few and the aim is the model itself.

    Args:
        tokens: calibration windows, int64 `[samples, seq]`.
        layers: the layers chosen in stage 1.

    Returns:
        One entry per step: step, loss, lm_loss, penalty (lambda2 * sum of D), D by layer (null while bypassed), gate,
        lambda2, lr, gradient_norm.

    Raises:
        CheckFailed: loss or gradient is not finite; the weights are then those of the step before.
    """
    settings, events = config.transfer, events or Events()
    batch = config.data.batch or BATCH
    steps = settings.epochs * math.ceil(len(tokens) / batch)
    if not steps:
        return []
    batches = epochs_of_batches(tokens, batch, torch.Generator().manual_seed(config.seed))
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if settings.objective == "distill" else None
    training = model.training
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(True)
    history = []
    try:
        with fp32_weights(model) as autocast, _gates(model, layers, settings) as gates:
            optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
            for step in range(steps):
                batch_tokens = next(batches).to(gates.values.device)
                with autocast:
                    entry = _step(model, teacher, batch_tokens, gates, optimizer, settings, step, steps)
                events.emit("transfer_step", **entry)
                history.append(entry)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.train(training)
    return history


def _gates(model: PreTrainedModel, layers: Sequence[int], settings: TransferConfig) -> LayerGates:
    mode = "residual" if settings.gate == "anneal" else None
    gates = LayerGates(model, mode=mode, layers=layers, detach_norms=settings.detach_input)
    gates.values.requires_grad_(False)
    return gates


def _step(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokens: Tensor,
    gates: LayerGates,
    optimizer: torch.optim.Optimizer,
    settings: TransferConfig,
    step: int,
    steps: int,
) -> dict[str, Any]:
    """One optimiser step; its entry of the history."""
    gate = gate_at(settings, step, steps)
    weight = lambda2_at(settings, step, steps)
    gates.values.fill_(gate)
    if gate == 0 and (settings.lambda2 == 0 or settings.detach_input):
        gates.bypass(gates.layers)  # out of the function, and of the loss or with a D of their own: do not compute
        gates.with_norms = settings.lambda2 > 0
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    objective = output.loss
    if teacher is not None:
        with torch.no_grad():
            target = teacher(input_ids=tokens, use_cache=False).logits
        objective = distillation_loss(output.logits, target)
    distances = gates.distances(settings.norm)
    penalty = weight * torch.stack(list(distances.values())).sum() if distances else objective.new_zeros(())
    loss = objective + penalty
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
    if not torch.isfinite(loss) or not torch.isfinite(norm):
        raise CheckFailed(
            f"the loss is {float(loss.detach())} with gradient norm {float(norm)} in step {step} of stage 2; "
            "lower transfer.lr or check the data."
        )
    rate = settings.lr * learning_rate_factor(settings.warmup, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return {
        "step": step,
        "steps": steps,
        "loss": float(loss.detach()),
        "lm_loss": float(output.loss.detach()),
        "penalty": float(penalty.detach()),
        "D": {layer: float(distances[layer].detach()) if layer in distances else None for layer in gates.layers},
        "gate": gate if settings.gate == "anneal" else 1.0,
        "lambda2": weight,
        "lr": rate,
        "gradient_norm": float(norm),
    }


def gate_at(settings: TransferConfig, step: int, steps: int) -> float:
    """The gate of the chosen layers: 1 at the first step, linearly to 0 after 1 - hold of the steps, then 0.

    It is 0 at the last step also where `hold` is 0, so that the cut changes nothing.
    """
    if settings.gate == "none":
        return 1.0
    falling = min((1 - settings.hold) * steps, steps - 1)
    return max(0.0, 1 - step / falling) if falling else 0.0


def lambda2_at(settings: TransferConfig, step: int, steps: int) -> float:
    """The penalty's weight: constant, or growing linearly to lambda2 at the last step."""
    return settings.lambda2 * ((step + 1) / steps if settings.lambda_schedule == "grow" else 1.0)


def learning_rate_factor(warmup: float, step: int, steps: int) -> float:
    """Linear warm-up over `warmup` of the steps, then linear decay to 1/steps of the way before 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(1, steps - rising)
