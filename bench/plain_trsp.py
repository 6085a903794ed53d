"""TRSP (arXiv 2505.18232) as printed, on plain transformers: what a careful reader of the paper would write.

The rival of bench_step.py, and an oracle for trsp_fast: nothing of trsp_fast is imported, nothing is fused, kept or
split, all weights train in both stages. Where the paper is silent it reads as trsp_fast's preset `paper` with
`select.train_weights`, so that both must choose the same layers and meet the same losses within rounding.

For models that keep decoder layers in `model.model.layers` and hand on a tensor (Llama, Mistral, Qwen, ...).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def select(
    model: PreTrainedModel,
    tokens: Tensor,
    count: int,
    *,
    lambda1: float = 5e-3,
    gate_lr: float = 1e-2,
    lr: float = 2e-5,
    batch: int = 16,
    steps_per_round: int = 0,
    seed: int = 0,
    amp: torch.dtype | None = None,
    on_step: Callable[[float], None] | None = None,
) -> tuple[list[int], list[float]]:
    """Stage 1 (section 3.2): learn S under LM + lambda1 * sum |S|, round by round; each removes the smallest.

    The weights learn with S and stay as they have become; S goes, and the bypassed layers are back, on return.

    Args:
        model: fp32 weights.
        tokens: calibration windows, int64 `[samples, seq]`; `batch` of them make a step.
        count: how many layers to choose, one per round of `steps_per_round` (0: one pass over the windows).
        lr: of the weights, constant; `gate_lr` is that of S.
        amp: dtype of autocast; None computes in fp32.
        on_step: called with the loss after every step.

    Returns:
        The layers in order of choice, and the loss of every step, the penalty included.
    """
    layers = model.model.layers
    model.eval().requires_grad_(True)  # no dropout: S measures the layers as they are used
    S = nn.Parameter(torch.ones(len(layers), device=model.device))
    weights = {"params": list(model.parameters()), "lr": lr}
    optimizer = torch.optim.AdamW([weights, {"params": [S], "lr": gate_lr}], weight_decay=0.0)
    # The final norm takes the last layer's scale away: it has no gradient but the penalty's and would always be chosen.
    alive, chosen, losses = list(range(len(layers) - 1)), [], []
    hooks = {i: layers[i].register_forward_hook(lambda _layer, _args, out, i=i: out * S[i]) for i in alive}
    batches = _batches(tokens.to(model.device), batch, seed)
    for _ in range(count):
        for _ in range(steps_per_round or math.ceil(len(tokens) / batch)):
            loss = _lm_loss(model, next(batches), amp) + lambda1 * S[alive].abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            _record(losses, loss, on_step)
        smallest = min(alive, key=S.detach().abs().tolist().__getitem__)
        alive.remove(smallest)
        chosen.append(smallest)
        hooks.pop(smallest).remove()
        layers[smallest].forward = _identity
    for hook in hooks.values():
        hook.remove()
    for layer in chosen:
        del layers[layer].forward
    return chosen, losses


def transfer(
    model: PreTrainedModel,
    tokens: Tensor,
    layers: Sequence[int],
    *,
    lambda2: float = 1e-3,
    lr: float = 2e-5,
    warmup: float = 0.03,
    clip: float = 1.0,
    batch: int = 4,
    epochs: int = 1,
    seed: int = 0,
    amp: torch.dtype | None = None,
    on_step: Callable[[float], None] | None = None,
) -> list[float]:
    """Stage 2 (section 3.3): train all weights under LM + lambda2 * sum over `layers` of ||out - x||.

    The norm is the root of the mean square over a sequence's elements, then the mean over sequences. The learning rate
    rises over `warmup` of the steps and falls linearly to 0. Returns the loss of every step, the penalty included.
    """
    model.eval().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps = epochs * math.ceil(len(tokens) / batch)
    rising = math.ceil(warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (t + 1) / rising if t < rising else (steps - t) / max(1, steps - rising)
    )
    distances: list[Tensor] = []
    hooks = [model.model.layers[i].register_forward_hook(_distance_into(distances)) for i in layers]
    batches, losses = _batches(tokens.to(model.device), batch, seed), []
    for _ in range(steps):
        distances.clear()
        lm_loss = _lm_loss(model, next(batches), amp)  # fills the distances
        loss = lm_loss + lambda2 * torch.stack(distances).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        _record(losses, loss, on_step)
    for hook in hooks:
        hook.remove()
    return losses


def _lm_loss(model: PreTrainedModel, tokens: Tensor, amp: torch.dtype | None) -> Tensor:
    with torch.autocast(model.device.type, amp, enabled=amp is not None):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _batches(tokens: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Every pass sees every window once, in a fresh order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(tokens), generator=generator).split(batch):
            yield tokens[rows]


def _distance_into(distances: list[Tensor]) -> Callable[..., None]:
    def hook(_layer: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        distances.append((out - args[0]).pow(2).mean((1, 2)).sqrt().mean())

    return hook


def _identity(hidden_states: Tensor, **_others: Any) -> Tensor:
    return hidden_states


def _record(losses: list[float], loss: Tensor, on_step: Callable[[float], None] | None) -> None:
    losses.append(float(loss.detach()))
    if on_step:
        on_step(losses[-1])
