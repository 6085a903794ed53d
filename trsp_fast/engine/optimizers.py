"""Optimisers that skip a step on the device, and their states by name."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Named = dict[str, nn.Parameter]


def adamw(parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW without weight decay, fused: one pass over the weights, and a step that can be called off on the device."""
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0, fused=True)


def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """One step of a fused optimiser, or none at all, its own counters included, where `finite` (0-D bool) is false.

    The flag stays on the device: fused optimisers read `found_inf` there, as torch's gradient scaler gives it to them.
    """
    device = optimizer.param_groups[0]["params"][0].device
    optimizer.found_inf = (~finite).float().to(device)  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]


def optimizer_state(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, Tensor]:
    """The optimiser's tensors as `NAME OF THE PARAMETER/NAME OF THE STATE`; inner tensors of quantised ones too."""
    found: dict[str, Tensor] = {}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            found |= {f"{name}/{path}": tensor for path, tensor in _plain_tensors(key, value)}
    return found


def load_optimizer_state(optimizer: torch.optim.Optimizer, named: Named, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave; the optimiser must be new. The parameters do not move.

    A first step with zero gradients and learning rate 0 makes the optimiser allocate its state.
    """
    if not tensors:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    kept = {name: parameter.detach().clone() for name, parameter in named.items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(kept[name])
            for key, value in optimizer.state[parameter].items():
                for path, tensor in _plain_tensors(key, value):
                    tensor.copy_(tensors[f"{name}/{path}"])


def _plain_tensors(key: str, value: object) -> list[tuple[str, Tensor]]:
    if hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:
        inner, _ = value.__tensor_flatten__()
        return [(f"{key}.{name}", getattr(value, name)) for name in inner]
    return [(key, value)] if isinstance(value, Tensor) else []
