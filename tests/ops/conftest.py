"""What the op tests share: the backends to test, hidden states, and the error budget against the fp64 oracle.

`cpu` is tested on CPU tensors. `triton` is tested on the GPU, or on CPU tensors in a process that was started with
TRITON_INTERPRET=1; test_interpreted.py starts one.
"""

import pytest
import torch

from trsp_fast.ops import available_backends

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = {"cpu": "cpu", "triton": TRITON_DEVICE}
BACKENDS = [name for name, device in DEVICES.items() if name in available_backends(device)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def device(backend):
    return DEVICES[backend]


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """torch.empty gives NaN in this mode, so an element that a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def states():
    """(x, out, ...) of one shape, different in every call site's shape and dtype, the same in every run."""

    def make(shape, dtype=torch.float32, *, device="cpu", count=2, grad=True):
        generator = torch.Generator().manual_seed(sum(shape) + len(shape))
        tensors = [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(count)]
        return [t.requires_grad_(grad) for t in tensors]

    return make


@pytest.fixture
def token_mask():
    def make(shape, *, device="cpu"):
        generator = torch.Generator().manual_seed(sum(shape))
        mask = torch.rand(shape[:-1], generator=generator) > 0.3
        return mask.to(device)

    return make


def in_fp64(value):
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


@pytest.fixture
def assert_accurate():
    """run(*arguments) -> {name: tensor or None}, called with ours, with eager and with eager on fp64 arguments.

    error(ours) <= 2 * error(eager in the same dtype) + 2 ulp, both against fp64. `scales` names results whose ulp is
    that of another magnitude (the gate's gradient: a sum that cancels).
    """

    def check(ours, eager, arguments, scales=None):
        got, low = ours(*arguments), eager(*arguments)
        exact = eager(*[in_fp64(a) for a in arguments])
        assert got.keys() == exact.keys()
        for name, want in exact.items():
            if want is None:
                assert got[name] is None, name
                continue
            assert got[name].dtype == low[name].dtype, name
            assert got[name].shape == want.shape, name
            if want.numel() == 0:
                continue
            scale = (scales or {}).get(name, want.abs())
            eager_error = (low[name].double() - want).abs().max()
            budget = 2 * eager_error + 2 * torch.finfo(got[name].dtype).eps * scale + torch.finfo(got[name].dtype).tiny
            error = (got[name].double() - want).abs()
            assert (error <= budget).all(), f"{name}: error {error.max():.2e}, eager's {eager_error:.2e}"

    return check
