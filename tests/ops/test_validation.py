"""Every argument that the fused ops refuse: one sentence that names it, the value seen and what to do."""

import pytest
import torch

from trsp_fast.ops import backends, gated_residual, residual_norms

X = torch.zeros(2, 3, 8)
BOTH = {
    "shape": ({"out": torch.zeros(2, 3, 4)}, r"same shape, got \(2, 3, 8\) and \(2, 3, 4\)"),
    "one dimension": ({"x": X[0, 0], "out": X[0, 0]}, r"shape \(G, ..., H\), got \(8,\)"),
    "dtype": ({"out": X.bfloat16()}, "same dtype, got torch.float32 and torch.bfloat16"),
    "integers": ({"x": X.int(), "out": X.int()}, "float64, got torch.int32"),
    "device": ({"out": X.to("meta")}, "same device, got cpu and meta"),
    "mask dtype": ({"token_mask": torch.ones(2, 3)}, "token_mask must be bool .* got torch.float32"),
    "mask shape": ({"token_mask": torch.ones(2, dtype=torch.bool)}, r"x.shape\[:-1\] = \(2, 3\), got \(2,\)"),
    "mask dimensions": ({"token_mask": torch.ones(1, 2, 3, dtype=torch.bool)}, r"got \(1, 2, 3\)"),
    "mask device": ({"token_mask": torch.ones(3, dtype=torch.bool, device="meta")}, "device cpu, got meta"),
    "unknown backend": ({"backend": "cuda"}, "reference, cpu, triton or None, got 'cuda'"),
    "fp64": ({"x": X.double(), "out": X.double(), "backend": "cpu"}, "no float64 kernels"),
}  # fmt: skip
GATE = {
    "mode": ({"mode": "both"}, "'output' or 'residual', got 'both'"),
    "gate is a number": ({"gate": 0.5}, "gate must be a tensor, got float"),
    "gate dtype": ({"gate": torch.ones((), dtype=torch.bfloat16)}, "gate must be float32, got torch.bfloat16"),
    "fp64 gate": ({"gate": torch.ones((), dtype=torch.float64)}, "gate must be float32, got torch.float64"),
    "gate shape": ({"gate": torch.ones(3)}, r"0-D or have shape \(2,\), got \(3,\)"),
    "gate of one": ({"gate": torch.ones(1)}, r"0-D or have shape \(2,\), got \(1,\)"),
    "gate device": ({"gate": torch.ones((), device="meta")}, "device cpu, got meta"),
}


def assert_one_sentence(error):
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message


@pytest.fixture(autouse=True)
def cpu_backend_present(monkeypatch):
    monkeypatch.setattr(backends, "HAS_CPU", True)


@pytest.mark.parametrize("case", BOTH)
def test_residual_norms_refuses(case):
    changed, message = BOTH[case]
    with pytest.raises(ValueError, match=message) as error:
        residual_norms(**({"x": X, "out": X} | changed))
    assert_one_sentence(error)


@pytest.mark.parametrize("case", BOTH | GATE)
def test_gated_residual_refuses(case):
    changed, message = (BOTH | GATE)[case]
    with pytest.raises(ValueError, match=message) as error:
        gated_residual(**({"x": X, "out": X, "gate": torch.ones(()), "mode": "output"} | changed))
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("state", "x", "backend", "remedy"),
    [
        ({"HAS_CPU": False}, X, "cpu", "reinstall with a C[+][+] compiler"),
        ({}, X.to("meta"), "cpu", "move the tensors to the CPU"),
        ({"HAS_TRITON": False, "INTERPRETED": False}, X, "triton", "install triton"),
        ({"HAS_TRITON": True, "INTERPRETED": False}, X, "triton", "TRITON_INTERPRET=1"),
    ],
)
def test_backend_that_is_not_there(monkeypatch, state, x, backend, remedy):
    for name, value in state.items():
        monkeypatch.setattr(backends, name, value)
    with pytest.raises(ValueError, match=remedy) as error:
        residual_norms(x, x, backend=backend)
    assert_one_sentence(error)
