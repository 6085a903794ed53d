"""The fused ops by themselves, as a backend of other code: the same numbers as plain PyTorch, and how fast.

python examples/ops_backend.py [--tokens 512] [--hidden 1024] [--dtype float32] [--device cpu] [--calls 5]

`x` and `out` are the hidden states before and after a layer. One pass gives the gated output and how far the layer
moved each sequence; the backward pass is one pass too, and stores no difference between them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import trsp_fast as trsp

Result = tuple[Tensor, Tensor, Tensor]


def plain(x: Tensor, out: Tensor, gate: Tensor) -> Result:
    """What `gated_residual` computes, as one would write it."""
    y = (gate * out + (1 - gate) * x).to(out.dtype)
    d = (out.float() - x.float()).flatten(1)
    return y, d.abs().sum(1), d.square().sum(1)


def fused(x: Tensor, out: Tensor, gate: Tensor) -> Result:
    return trsp.gated_residual(x, out, gate, mode="residual")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=5)
    arguments = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    shape, dtype = (arguments.sequences, arguments.tokens, arguments.hidden), getattr(torch, arguments.dtype)
    x, out = (torch.randn(shape, generator=generator).to(arguments.device, dtype).requires_grad_() for _ in range(2))
    gate = torch.tensor(0.7, device=arguments.device, requires_grad=True)
    inputs = {"x": x, "out": out, "gate": gate}

    found = {function.__name__: values(function, inputs) for function in (plain, fused)}
    for name, theirs in found["plain"].items():
        ours = found["fused"][name]
        worst = ((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()).item()
        print(f"{name:>12}: largest difference {worst:.1e} of the largest value")
    seconds = {function.__name__: timed(function, inputs, arguments.calls) for function in (plain, fused)}
    print(f"forward and backward: plain {1e3 * seconds['plain']:.2f} ms, fused {1e3 * seconds['fused']:.2f} ms")

    l1, l2 = trsp.residual_norms(x, out)  # the norms alone, where the layer's own output stays
    print(f"norms alone equal those of the gate: {torch.equal(l1, fused(x, out, gate)[1])}, l2 {l2[0].item():,.1f}")


def values(function: Callable[..., Result], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results and gradients, by name, of a loss that uses all three results."""
    y, l1, l2 = function(**inputs)
    loss = y.float().square().mean() + 1e-3 * (l1.mean() + l2.sqrt().mean())
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    results = {"y": y.detach(), "l1": l1.detach(), "l2": l2.detach()}
    return results | {f"d loss/d {name}": g for name, g in zip(inputs, gradients, strict=True)}


def timed(function: Callable[..., Result], inputs: dict[str, Tensor], calls: int) -> float:
    """Seconds of a forward and backward pass, the median over calls after one that warms up."""
    measured = []
    for _ in range(calls + 1):
        began = time.perf_counter()
        values(function, inputs)
        if inputs["x"].is_cuda:
            torch.cuda.synchronize()
        measured.append(time.perf_counter() - began)
    return statistics.median(measured[1:])


if __name__ == "__main__":
    main()
