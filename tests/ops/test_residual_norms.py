"""residual_norms against its fp64 oracle, and what it promises beyond numbers."""

import functools

import pytest
import torch

from trsp_fast.ops import reference, residual_norms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
USES = ["1", "2", "12"]  # which of l1, l2 get an incoming gradient


def run(function, use, x, out, mask, c1, c2):
    l1, l2 = function(x, out, token_mask=mask)
    tensors, incoming = zip(*[pair for pair, key in (((l1, c1), "1"), ((l2, c2), "2")) if key in use], strict=True)
    inputs = {name: t for name, t in (("dx", x), ("dout", out)) if t.requires_grad}
    grads = torch.autograd.grad(tensors, list(inputs.values()), incoming)
    return {"l1": l1, "l2": l2} | dict(zip(inputs, grads, strict=True))


@pytest.fixture
def arguments(states, token_mask, device):
    def make(shape, dtype=torch.float32, *, masked=False):
        x, out = states(shape, dtype, device=device)
        mask = token_mask(shape, device=device) if masked else None
        return x, out, mask, *(torch.linspace(*ends, shape[0], device=device) for ends in ((-0.5, 1.0), (0.8, 0.3)))

    return make


@pytest.fixture
def check(assert_accurate, backend):
    def compare(arguments, use="12"):
        ours = functools.partial(run, functools.partial(residual_norms, backend=backend), use)
        assert_accurate(ours, functools.partial(run, reference.residual_norms, use), arguments)

    return compare


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_oracle(check, arguments, dtype, masked, use):
    check(arguments((3, 5, 7), dtype, masked=masked), use)
    check(arguments((2, 70, 130), dtype, masked=masked), use)


SHAPES = [(1, 1), (5, 1, 1), (37, 3), (2, 3, 1031), (2, 3, 5, 64), (3, 9, 2560), (0, 3, 8), (2, 0, 8), (2, 3, 0)]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(check, arguments, shape, masked):
    check(arguments(shape, torch.bfloat16, masked=masked))


def test_long_sequences_stay_accurate(check, arguments):
    check(arguments((1, 600, 4096)))  # more tiles than the second stage adds at a time


def test_non_contiguous(check, arguments):
    x, out, *_ = arguments((6, 4, 10))
    x, out = (t.detach().transpose(0, 1)[:, ::2].requires_grad_() for t in (x, out))
    mask = torch.tensor([True, False, True], device=x.device)
    c = torch.ones((), device=x.device).expand(4)
    check((x, out, mask, c, c))


def test_padding_may_hold_nan(backend, arguments):
    x, out, mask, c1, c2 = arguments((2, 40, 64), masked=True)
    bad = [torch.where(mask.unsqueeze(-1), t.detach(), float("nan")).requires_grad_() for t in (x, out)]
    call = functools.partial(run, functools.partial(residual_norms, backend=backend), "12")
    clean, dirty = call(x, out, mask, c1, c2), call(*bad, mask, c1, c2)
    for name, want in clean.items():
        assert torch.equal(dirty[name], want), name
    everything_kept = residual_norms(*bad, backend=backend)
    assert everything_kept[0].isnan().all()
    assert everything_kept[1].isnan().all()


def test_infinite_incoming_gradient_stays_out_of_dropped_tokens(backend, arguments):
    x, out, mask, c1, c2 = arguments((2, 40, 64), masked=True)
    got = run(functools.partial(residual_norms, backend=backend), "12", x, out, mask, c1, c2 * float("inf"))
    for name in ("dx", "dout"):
        assert not got[name][~mask].any(), name
        assert got[name][mask].isinf().all(), name


def test_small_differences_of_large_states(backend, device):
    """The difference is taken in fp32: one bf16 step of 256 is kept, not rounded away."""
    x = torch.full((1, 4, 32), 256.0, dtype=torch.bfloat16, device=device)
    l1, l2 = residual_norms(x, x + 2.0, backend=backend)
    assert (l1.item(), l2.item()) == (256.0, 512.0)
    l1, _ = residual_norms(x, torch.full_like(x, 1e-3), backend=backend)
    assert l1.item() == pytest.approx(128 * (256 - torch.tensor(1e-3).bfloat16().item()), rel=2e-7)


@pytest.mark.parametrize("needs", ["x", "out"])
def test_only_the_gradient_asked_for(backend, arguments, needs):
    x, out, mask, c1, c2 = arguments((2, 40, 130), masked=True)
    call = functools.partial(run, functools.partial(residual_norms, backend=backend), "12")
    full = call(x, out, mask, c1, c2)
    x.requires_grad_(needs == "x")
    out.requires_grad_(needs == "out")
    name = f"d{needs}"
    assert torch.equal(call(x, out, mask, c1, c2)[name], full[name])


def test_backward_keeps_only_its_inputs(backend, arguments):
    x, out, mask, c1, c2 = arguments((2, 40, 130), masked=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        norms = residual_norms(x, out, token_mask=mask, backend=backend)
    assert saved == [x.data_ptr(), out.data_ptr(), mask.data_ptr()]
    torch.autograd.backward(norms, (c1, c2))
    assert [t._version for t in (x, out, mask, c1, c2)] == [0] * 5


def test_second_derivatives_are_refused(backend, arguments):
    x, out, _, c1, _ = arguments((2, 3, 8))
    (dx,) = torch.autograd.grad(residual_norms(x, out, backend=backend)[1], x, c1.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_bits_repeat_and_do_not_depend_on_the_number_of_threads(backend, arguments):
    case = arguments((2, 150 if backend == "cpu" else 9, 1031), masked=True)
    threads = torch.get_num_threads()
    seen = []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            seen.append(run(functools.partial(residual_norms, backend=backend), "12", *case))
    finally:
        torch.set_num_threads(threads)
    for later in seen[1:]:
        for name, want in seen[0].items():
            assert torch.equal(later[name], want), name
