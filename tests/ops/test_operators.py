"""The dispatcher ops behind both functions: schemas, fakes, torch.compile; and the choice between backends."""

import warnings

import pytest
import torch

from trsp_fast.ops import available_backends, backends, gated_residual, residual_norms

OPS = torch.ops.trsp_fast
SHAPE = (2, 30, 8)


@pytest.fixture
def tensors(states, token_mask, device):
    x, out, dy = states(SHAPE, torch.bfloat16, device=device, count=3, grad=False)
    c = torch.ones(2, device=device)
    return {"x": x, "out": out, "dy": dy, "mask": token_mask(SHAPE, device=device), "c": c, "gate": c[0] * 0.7}


def calls(t):
    """(op, arguments) of every kind: all results wanted, few wanted, few given."""
    x, out, dy, mask, c, gate = (t[name] for name in ("x", "out", "dy", "mask", "c", "gate"))
    per_sequence = gate.expand(2).contiguous()
    yield "gated_residual_{}", (x, out, gate, mask, True, True)
    yield "gated_residual_{}", (x.transpose(0, 1), out.transpose(0, 1), gate, None, False, False)
    yield "gated_residual_{}_backward", (dy, x, out, per_sequence, mask, c, c, True, True, True, True)
    yield "gated_residual_{}_backward", (dy, None, out, gate, None, None, None, False, False, True, True)
    yield "gated_residual_{}_backward", (dy, None, None, gate, None, None, None, True, True, False, False)
    yield "residual_norms_{}", (x, out, mask)
    yield "residual_norms_{}_backward", (x, out, mask, c, None, True, False)
    yield "residual_norms_{}_backward", (x.transpose(0, 1)[:2], out.transpose(0, 1)[:2], None, c, c, False, True)


def test_opcheck(backend, tensors):
    for name, arguments in calls(tensors):
        torch.library.opcheck(getattr(OPS, name.format(backend)).default, arguments)


def test_schemas_agree(backend):
    for name in ("gated_residual_{}", "gated_residual_{}_backward", "residual_norms_{}", "residual_norms_{}_backward"):
        ours, cpu = (getattr(OPS, name.format(b)).default._schema for b in (backend, "cpu"))
        assert str(ours).replace(backend, "cpu") == str(cpu)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("mode", ["output", "residual"])
def test_compiles_without_graph_breaks(backend, tensors, mode, norms, dynamic):
    x, out = (tensors[name].float().requires_grad_() for name in ("x", "out"))
    gate = tensors["gate"].requires_grad_()

    def loss(x, out, gate, mask):
        y, l1, l2 = gated_residual(x, out, gate, mode=mode, norms=norms, token_mask=mask, backend=backend)
        total = y.square().sum()
        if norms:
            n1, n2 = residual_norms(x, out, token_mask=mask, backend=backend)
            total = total + (l1 * l2.sqrt() + n1 * n2.sqrt()).sum()
        return total

    arguments = (x, out, gate, tensors["mask"])
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    got, want = (torch.autograd.grad(f(*arguments), arguments[:3], allow_unused=True) for f in (compiled, loss))
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert (want[0] is None) == (mode == "output" and not norms)


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in available_backends("cpu"), reason="trsp_fast was installed without its C++ extension")
def test_compiles_with_inductor():
    x, out = (torch.randn(2, 30, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    gate = torch.tensor(0.7, requires_grad=True)

    def loss(x, out, gate):
        y, l1, l2 = gated_residual(torch.nn.functional.silu(x), out, gate, mode="residual")
        return y.float().square().sum() + (l1 + l2.sqrt()).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    got, want = (torch.autograd.grad(f(x, out, gate), (x, out, gate)) for f in (compiled, loss))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_first_layer_compiles(backend, tensors):
    """Embeddings need no gradient in stage 1: the norms of the first layer then are constants."""
    gate = tensors["gate"].requires_grad_()

    def loss(x, out, gate):
        y, l1, _ = gated_residual(x, out, gate, mode="residual", backend=backend)
        return y.float().sum() + l1.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(tensors["x"], tensors["out"], gate), gate)[0] for f in (compiled, loss))
    assert torch.equal(got, want)


@pytest.mark.skipif("cpu" not in available_backends("cpu"), reason="trsp_fast was installed without its C++ extension")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("residual_norms_cpu", lambda x: (x, x[:1], None)),
        ("residual_norms_cpu", lambda x: (x, x.float(), None)),
        ("residual_norms_cpu", lambda x: (x.double(), x.double(), None)),
        ("residual_norms_cpu", lambda x: (x, x, torch.ones(SHAPE[:-1]))),
        ("residual_norms_cpu_backward", lambda x: (x, x, None, torch.ones(2).double(), None, True, True)),
        ("gated_residual_cpu", lambda x: (x, x, torch.tensor(1.0).double(), None, True, True)),
        ("gated_residual_cpu_backward", lambda x: (x, None, None, torch.tensor(1.0), *[None] * 3, *[True] * 4)),
    ],
)  # fmt: skip
def test_cpu_kernels_refuse_what_they_cannot_read(name, arguments):
    with pytest.raises((ValueError, RuntimeError), match=r"must (be|have)|are needed"):
        getattr(OPS, name)(*arguments(torch.zeros(SHAPE, dtype=torch.bfloat16)))


def test_default_backend():
    x = torch.ones(2, 3, 8)
    assert backends.choose(None, x) == ("cpu" if backends.HAS_CPU else "reference")
    assert backends.choose(None, x.double()) == "reference"
    assert backends.choose(None, x.to("meta")) == "reference"
    assert available_backends("cuda") == (("triton", "reference") if backends.HAS_TRITON else ("reference",))
    assert available_backends("cpu")[0] == backends.choose(None, x)


@pytest.mark.parametrize("failure", ["missing", "broken"])
def test_missing_extension_is_said_once(monkeypatch, failure):
    def find_spec(name):
        return None if failure == "missing" else object()

    def import_module(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr(backends.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(backends.importlib, "import_module", import_module)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert backends._load_cpu() is False
    (warning,) = seen
    assert "reference backend" in str(warning.message)
