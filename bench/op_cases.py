"""The cases of the fused ops that the benchmarks share: what is called, what is wanted back, what must move."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trsp_fast.ops import gated_residual, reference, residual_norms

PASSES = ("forward", "backward", "both")
PROVIDERS = ("eager", "compile", "ours")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS_PER_SEQUENCE = 2048
SLACK = 1000  # ulp of fp32: 1e-4


@dataclass(frozen=True)
class Case:
    """One use of an op; `moves` counts the hidden states that each pass must read and write once.

    mode None is residual_norms. `norms` asks for l1 and l2, `penalty` sends gradients back through them, `frozen`
    wants no gradient of the gate.
    """

    name: str
    mode: str | None
    norms: bool
    penalty: bool
    frozen: bool
    forward: int
    backward: int

    def moves(self, which: str) -> int:
        return {"forward": self.forward, "backward": self.backward, "both": self.forward + self.backward}[which]


CASES = {
    case.name: case
    for case in (
        Case("output, penalty", "output", True, True, False, 3, 5),
        Case("residual, penalty", "residual", True, True, False, 3, 5),
        Case("norms only", None, True, True, False, 2, 4),
        Case("output, norms kept as figures", "output", True, False, False, 3, 3),
        Case("residual, no norms", "residual", False, False, False, 3, 5),
        Case("residual, no norms, frozen gate", "residual", False, False, True, 3, 3),
    )
}


@dataclass
class Problem:
    """The tensors of one case at one size: inputs and the gradients that come in from above."""

    case: Case
    x: Tensor
    out: Tensor
    gate: Tensor
    dy: Tensor
    c: Tensor

    @classmethod
    def make(cls, case: Case, tokens: int, hidden: int, dtype: torch.dtype, device: str) -> "Problem":
        sequences = max(1, tokens // TOKENS_PER_SEQUENCE)
        shape = (sequences, tokens // sequences, hidden)
        generator = torch.Generator(device).manual_seed(tokens + hidden)
        x, out, dy = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(3))
        gate = torch.tensor(0.7, device=device, requires_grad=not case.frozen)
        c = torch.linspace(-0.5, 1.0, sequences, device=device)
        return cls(case, x.requires_grad_(), out.requires_grad_(), gate, dy, c)

    @property
    def inputs(self) -> list[Tensor]:
        return [self.x, self.out] + ([] if self.case.mode is None else [self.gate])

    @property
    def wanted(self) -> list[Tensor]:
        """The inputs whose gradients the case asks for; output mode without a penalty has none for x."""
        wanted = [self.out] if self.case.mode == "output" and not self.case.penalty else [self.x, self.out]
        return wanted + ([] if self.case.mode is None or self.case.frozen else [self.gate])

    def incoming(self, outputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs that gradients come back through, and these gradients."""
        pairs = [(outputs[0], self.dy)] if self.case.mode is not None else []
        if self.case.penalty:
            pairs += [(sums, self.c.to(sums.dtype)) for sums in outputs[-2:]]
        return [output for output, _ in pairs], [gradient for _, gradient in pairs]

    def backward(self, outputs: tuple[Tensor, ...], *, again: bool = False) -> tuple[Tensor, ...]:
        through, gradients = self.incoming(outputs)
        return torch.autograd.grad(through, self.wanted, gradients, retain_graph=again)

    def slice(self, sequence: int, dtype: torch.dtype | None = None) -> "Problem":
        """One sequence of it, as leaves of their own; in another dtype when one is given."""

        def part(tensor: Tensor) -> Tensor:
            taken = tensor.detach()[sequence : sequence + 1]
            return (taken if dtype is None else taken.to(dtype)).requires_grad_(tensor.requires_grad)

        gate = self.gate.detach() if dtype is None else self.gate.detach().to(dtype)
        gate = gate.clone().requires_grad_(self.gate.requires_grad)
        return Problem(self.case, part(self.x), part(self.out), gate, part(self.dy), part(self.c))


def call(provider: str, case: Case) -> Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]:
    """The function (x, out, gate) -> outputs by which a provider runs a case; "triton" is ours on that backend."""
    if provider in ("ours", "triton"):
        backend = None if provider == "ours" else provider
        if case.mode is None:
            return lambda x, out, gate: residual_norms(x, out, backend=backend)
        return lambda x, out, gate: gated_residual(x, out, gate, mode=case.mode, norms=case.norms, backend=backend)

    def eager(x: Tensor, out: Tensor, gate: Tensor) -> tuple[Any, ...]:
        if case.mode is None:
            return reference.residual_norms(x, out)
        return reference.gated_residual(x, out, gate, mode=case.mode, norms=case.norms)

    if provider == "eager":
        return eager
    torch._dynamo.reset()
    return torch.compile(eager, fullgraph=True, dynamic=False)


def check(problem: Problem, outputs: tuple[Any, ...], *, sum_ulps: int = 2) -> str | None:
    """What is wrong with a provider's results, None if nothing is.

    Sequence by sequence against fp64: an error may be twice that of eager in the same dtype, plus 2 ulp. The gate's
    gradient is a sum that cancels, so its ulp is that of the sum of magnitudes. `sum_ulps` is what sums may have
    instead of 2 ulp: compiled eager adds in fp32 one after another, and is let off with SLACK.
    """
    tensors = [t for t in outputs if t is not None]
    got = [t.detach() for t in (*tensors, *problem.backward(outputs, again=True))]
    totals: dict[str, Tensor | float] = {"want": 0.0, "low": 0.0, "scale": 0.0}
    has_dgate = problem.gate.requires_grad and problem.case.mode is not None
    compared = got[:-1] if has_dgate else got
    for sequence in range(len(problem.x)):
        low, exact = problem.slice(sequence), problem.slice(sequence, torch.float64)
        eager, want = (_results(p) for p in (low, exact))
        for ours, rough, right in zip(compared, eager, want, strict=False):
            ours, right = ours[sequence : sequence + 1].double(), right.double()
            ulps = sum_ulps if right.dim() == 1 else 2
            bound = 2 * (rough.double() - right).abs().max() + ulps * torch.finfo(rough.dtype).eps * right.abs()
            worst = ((ours - right).abs() - bound).max()
            if not worst <= torch.finfo(rough.dtype).tiny:
                return f"error beyond the budget by {worst:.3g} in sequence {sequence}"
        if has_dgate:
            cofactor = exact.out - exact.x if problem.case.mode == "residual" else exact.out
            totals["want"] += want[-1]
            totals["low"] += eager[-1].double()
            totals["scale"] += (exact.dy * cofactor).abs().sum().detach()
    if has_dgate:
        bound = 2 * abs(totals["low"] - totals["want"]) + sum_ulps * torch.finfo(torch.float32).eps * totals["scale"]
        if not abs(got[-1].double() - totals["want"]) <= bound:
            return f"gate gradient {got[-1]:.8g}, should be {totals['want']:.8g}"
    return None


def _results(problem: Problem) -> list[Tensor]:
    outputs = call("eager", problem.case)(problem.x, problem.out, problem.gate)
    tensors = [t for t in outputs if t is not None]
    return [t.detach() for t in (*tensors, *problem.backward(outputs))]
