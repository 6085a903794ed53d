"""Optimisers that skip a step on the device, and their states by name."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trsp_fast.errors import UserError
from trsp_fast.run.state import fitting

Named = dict[str, nn.Parameter]

# Bytes of state per trained weight: two moments in fp32, or in 8 bits with one fp32 scale for 256 of them.
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.0 + 2 * 4 / 256}
FACTOR = "factor"  # of a parameter group: what its learning rate is in units of the optimiser's


def make_optimizer(
    kind: str, named: Named, lr: float, betas: tuple[float, float], factors: Mapping[str, float]
) -> torch.optim.Optimizer:
    """`adamw`, or `adamw8bit`: torchao's, which keeps the moments of large weights in 8 bits.

    Args:
        factors: by name of a weight its learning rate in units of `lr`; 1 where there is none.

    Raises:
        UserError: torchao is not installed.
    """
    require_optimizer(kind)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        groups.setdefault(factors.get(name, 1.0), []).append(parameter)
    parameters = [{"params": group, "lr": lr * factor, FACTOR: factor} for factor, group in groups.items()]
    if kind == "adamw":
        return adamw(parameters, lr, betas)
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=lr, betas=betas, weight_decay=0.0)


def require_optimizer(kind: str) -> None:
    """Refuse before stage 1 what stage 2 would lack.

    Raises:
        UserError: torchao is needed and is not installed.
    """
    if kind != "adamw8bit":
        return
    try:
        importlib.import_module("torchao.optim")
    except ImportError:
        raise UserError(
            "transfer.optimizer is adamw8bit, which needs the package torchao; install trsp_fast[torchao], or leave it "
            "at adamw."
        ) from None


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next steps. torchao keeps it in a tensor, which must stay the same one."""
    for group in optimizer.param_groups:
        own = rate * group.get(FACTOR, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def adamw(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW without weight decay, fused: one pass over the weights, and a step that can be called off on the device."""
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0, fused=True)


def step_if(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """One step of an optimiser, or none at all, its own counters included, where `finite` (0-D bool) is false.

    The flag stays on the device: fused optimisers read `found_inf` there, as torch's gradient scaler gives it to them.
    Others have to wait for it.
    """
    if not optimizer.defaults.get("fused"):
        if finite:
            optimizer.step()
        return
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

    A first step with zero gradients and learning rate 0 makes the optimiser allocate its state. A weight that had no
    gradient yet, such as that of an expert that no token has reached, has none, and begins later as it would have.

    Raises:
        UserError: the state is that of another kind of optimiser or of other weights.
    """
    if not tensors:
        return
    first = optimizer.param_groups[0]
    rate = float(first["lr"]) / first.get(FACTOR, 1.0)
    set_rate(optimizer, 0.0)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    set_rate(optimizer, rate)
    saved = {name.rpartition("/")[0] for name in tensors}
    with torch.no_grad():
        for name, parameter in named.items():
            if name not in saved:
                del optimizer.state[parameter]
                continue
            for key, value in optimizer.state[parameter].items():
                for path, tensor in _plain_tensors(key, value):
                    tensor.copy_(fitting(tensors, f"{name}/{path}", tensor))


def _plain_tensors(key: str, value: object) -> list[tuple[str, Tensor]]:
    if hasattr(value, "__tensor_flatten__") and type(value) is not Tensor:
        inner, _ = value.__tensor_flatten__()
        return [(f"{key}.{name}", getattr(value, name)) for name in inner]
    return [(key, value)] if isinstance(value, Tensor) else []
