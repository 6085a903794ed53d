"""The reference: its derivatives against finite differences, its values against numbers worked out by hand."""

import pytest
import torch

from trsp_fast.ops import gated_residual, residual_norms

X = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [5.0, 5.0]]])
OUT = torch.tensor([[[2.0, 0.0], [3.0, 5.0]], [[0.0, 3.0], [1.0, 5.0]]])  # d: 1 -2 | 0 1,  0 3 | -4 0


def test_values_by_hand():
    gate = torch.tensor([0.5, 2.0])
    y, l1, l2 = gated_residual(X, OUT, gate, mode="residual", backend="reference")
    assert y.tolist() == [[[1.5, 1.0], [3.0, 4.5]], [[0.0, 6.0], [-3.0, 5.0]]]
    assert (l1.tolist(), l2.tolist()) == ([4.0, 7.0], [6.0, 25.0])
    y, none, also_none = gated_residual(X, OUT, gate, mode="output", norms=False, backend="reference")
    assert y.tolist() == [[[1.0, 0.0], [1.5, 2.5]], [[0.0, 6.0], [2.0, 10.0]]]
    assert none is None
    assert also_none is None


def test_mask_and_gradients_by_hand():
    x, out = X.clone().requires_grad_(), OUT.clone().requires_grad_()
    mask = torch.tensor([[True, False], [True, True]])
    l1, l2 = residual_norms(x, out, token_mask=mask, backend="reference")
    assert (l1.tolist(), l2.tolist()) == ([3.0, 7.0], [5.0, 25.0])
    dx, dout = torch.autograd.grad((l1, l2), (x, out), (torch.tensor([10.0, 20.0]), torch.tensor([1.0, 2.0])))
    assert dout.tolist() == [[[12.0, -14.0], [0.0, 0.0]], [[0.0, 32.0], [-36.0, 0.0]]]
    assert torch.equal(dx, -dout)


def test_half_precision_is_computed_in_fp32():
    x, out = torch.full((1, 1, 2), 256.0).bfloat16(), torch.full((1, 1, 2), 1.0).bfloat16()
    y, l1, l2 = gated_residual(x, out, torch.tensor(1 / 3), mode="output", backend="reference")
    assert l1.item() == 510.0
    assert l2.item() == 2 * 255.0**2
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (out.float() / 3).bfloat16())


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("mode", ["output", "residual"])
def test_gradcheck(states, token_mask, mode, per_sequence, masked):
    x, out = states((2, 3, 5), torch.float64)
    gate = torch.full((2,) if per_sequence else (), 0.3, dtype=torch.float64, requires_grad=True)
    mask = token_mask((2, 3, 5)) if masked else None
    assert torch.autograd.gradcheck(lambda *t: gated_residual(*t, mode=mode, token_mask=mask), (x, out, gate))
    assert torch.autograd.gradcheck(lambda *t: residual_norms(*t, token_mask=mask), (x, out))


def test_fp32_gate_with_fp64_states(states):
    x, out = states((2, 3, 5), torch.float64)
    y, l1, _ = gated_residual(x, out, torch.tensor(0.5), mode="residual")
    assert (y.dtype, l1.dtype) == (torch.float64, torch.float64)


def test_compiles_without_graph_breaks(states):
    x, out = states((2, 3, 8))
    compiled = torch.compile(gated_residual, fullgraph=True, backend="aot_eager")
    gate = torch.tensor(0.5)
    for got, want in zip(
        compiled(x, out, gate, mode="residual", backend="reference"),
        gated_residual(x, out, gate, mode="residual", backend="reference"),
        strict=True,
    ):
        assert torch.equal(got, want)
