"""gated_residual against its fp64 oracle, and what it promises beyond numbers."""

import functools

import pytest
import torch

from trsp_fast.ops import gated_residual, reference, residual_norms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = ["output", "residual"]
# Which results get an incoming gradient (y, l1, l2 as y, 1, 2); "none" asks for no norms at all.
USES = {"none": "y", "y": "y", "y-l1": "y1", "y-l2": "y2", "y-l1-l2": "y12", "l1-l2": "12"}


def run(function, mode, use, x, out, gate, mask, dy, c1, c2):
    """Every result and gradient of one call by name; None where autograd finds no path."""
    y, l1, l2 = function(x, out, gate, mode=mode, norms=use != "none", token_mask=mask)
    pairs = [(t, g) for t, g, key in ((y, dy, "y"), (l1, c1, "1"), (l2, c2, "2")) if key in USES[use]]
    inputs = {name: t for name, t in (("dx", x), ("dout", out), ("dgate", gate)) if t.requires_grad}
    tensors, incoming = zip(*pairs, strict=True)
    grads = torch.autograd.grad(tensors, list(inputs.values()), incoming, allow_unused=True)
    return {"y": y, "l1": l1, "l2": l2} | dict(zip(inputs, grads, strict=True))


@pytest.fixture
def arguments(states, token_mask, device):
    """x, out, gate, mask, dy, c1, c2 of one shape; the gradients of the sums differ per sequence."""

    def make(shape, dtype=torch.float32, *, masked=False, gate=0.7, device=device):
        x, out, dy = states(shape, dtype, device=device, count=3)
        gate = torch.tensor(gate, device=device, requires_grad=True)
        mask = token_mask(shape, device=device) if masked else None
        c1, c2 = (torch.linspace(low, high, shape[0], device=device) for low, high in ((-0.5, 1.0), (0.8, 0.3)))
        return x, out, gate, mask, dy.detach(), c1, c2

    return make


@pytest.fixture
def check(assert_accurate, backend):
    def compare(arguments, mode, use):
        x, out, gate, _, dy, _, _ = arguments
        cofactor = (out - x if mode == "residual" else out).detach().double()
        products = (dy.double() * cofactor).abs().flatten(1).sum(1).detach()
        ours = functools.partial(run, functools.partial(gated_residual, backend=backend), mode, use)
        eager = functools.partial(run, reference.gated_residual, mode, use)
        assert_accurate(ours, eager, arguments, {"dgate": products if gate.dim() else products.sum()})

    return compare


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_oracle(check, arguments, dtype, mode, masked, use):
    check(arguments((3, 5, 7), dtype, masked=masked), mode, use)
    check(arguments((2, 70, 130), dtype, masked=masked), mode, use)  # several tiles, the last ones partly empty


SHAPES = [(1, 1), (5, 1, 1), (37, 3), (1, 4099), (2, 3, 1031), (2, 3, 5, 64), (3, 9, 2560)]


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(check, arguments, shape, masked):
    check(arguments(shape, torch.bfloat16, masked=masked), "residual", "y-l1-l2")


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_zero_rows(check, arguments, shape, mode, use):
    check(arguments(shape, masked=True), mode, use)


@pytest.mark.parametrize("mode", MODES)
def test_non_contiguous(check, arguments, mode):
    x, out, gate, _, dy, c1, c2 = arguments((6, 4, 10), torch.bfloat16)
    x, out = (t.detach().transpose(0, 1)[:, ::2].requires_grad_() for t in (x, out))
    mask = torch.tensor([True, False, True], device=x.device)  # broadcast over the sequences
    dy = dy.transpose(0, 1)[:, :1, :1].expand(x.shape)
    for t in (x, out, dy):
        assert not t.is_contiguous()
    check((x, out, gate, mask, dy, c1[:1].expand(4), c2[::2][:1].expand(4)), mode, "y-l1-l2")


@pytest.mark.parametrize("mode", MODES)
def test_huge_fp16_values_do_not_overflow_inside(check, arguments, mode):
    x, out, gate, _, dy, c1, c2 = arguments((2, 9, 16), torch.float16)
    x, out = torch.full_like(x, 6e4).requires_grad_(), torch.full_like(out, -6e4).requires_grad_()
    check((x, out, gate, None, dy, c1, c2 * 1e-5), mode, "y-l1-l2")


@pytest.mark.parametrize("mode", MODES)
def test_gate_per_sequence(backend, arguments, check, mode):
    *shared, mask, dy, c1, c2 = arguments((5, 40, 129), masked=True)
    x, out, gate = shared
    many = torch.linspace(-0.5, 1.5, 10, device=x.device)[::2].requires_grad_()
    check((x, out, many, mask, dy, c1, c2), mode, "y-l1-l2")

    per_sequence = gate.expand(5)  # stride 0: how the layer gates ask for one gradient per sequence
    call = functools.partial(gated_residual, x, out, mode=mode, token_mask=mask, backend=backend)
    (grads,) = torch.autograd.grad(call(per_sequence)[0], per_sequence, dy)
    assert grads.shape == (5,)
    for g in range(5):
        alone = gated_residual(x[g : g + 1], out[g : g + 1], gate, mode=mode, backend=backend)[0]
        assert torch.equal(torch.autograd.grad(alone, gate, dy[g : g + 1])[0], grads[g])
    (total,) = torch.autograd.grad(call(gate)[0], gate, dy)
    assert total.shape == ()
    torch.testing.assert_close(total, grads.sum())


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 1201, 2999), torch.float32), ((2, 1201, 7001), torch.bfloat16)], ids=str
)
def test_results_beyond_the_cache(backend, device, arguments, shape, dtype):
    """32 MiB and more: the CPU writes past the cache, and by other stores where a row is out of step with 16 bytes."""
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter would take minutes")
    x, out, gate, mask, dy, c1, c2 = arguments(shape, dtype, masked=True)
    ours = run(
        functools.partial(gated_residual, backend=backend), "residual", "y-l1-l2", x, out, gate, mask, dy, c1, c2
    )
    in_fp32 = [t.detach().float().requires_grad_() for t in (x, out)]
    eager = run(reference.gated_residual, "residual", "y-l1-l2", *in_fp32, gate, mask, dy.float(), c1, c2)
    for name in ("y", "dx", "dout"):
        torch.testing.assert_close(ours[name], eager[name].to(dtype), msg=name)
    for name in ("l1", "l2"):
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-5, atol=0, msg=name)


def bits(tensor):
    return tensor.detach().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_sequence", [False, True])
def test_gate_one_is_out_and_gate_zero_is_x_bit_for_bit(backend, device, states, dtype, per_sequence):
    x, out = states((2, 30, 50), dtype, device=device, grad=False)
    limits = torch.finfo(dtype)
    subnormal = limits.smallest_normal / 4
    if dtype == torch.bfloat16 and backend == "triton" and device == "cpu":
        subnormal = 3.0  # Triton's interpreter reads bf16 subnormals as 0
    odd = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, subnormal, -1.0], dtype=dtype)
    pairs = torch.cartesian_prod(odd, odd).to(device)
    x[:, 0, :49], out[:, 0, :49] = pairs[:, 0], pairs[:, 1]
    for mode, value, same in (("output", 1.0, out), ("residual", 1.0, out), ("residual", 0.0, x)):
        gate = torch.full((2,) if per_sequence else (), value, device=device)
        y, _, _ = gated_residual(x, out, gate, mode=mode, backend=backend)
        assert torch.equal(bits(y), bits(same))
        assert y.data_ptr() not in (x.data_ptr(), out.data_ptr())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_value_converts_as_in_pytorch(backend, device, dtype):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates fp32 to bf16")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device).reshape(64, 1024)
    for value in (1.0, 1.0 / 3.0, 1e-4, 2.0**-17, 3e4):
        gate = torch.tensor(value, device=device)
        y, _, _ = gated_residual(every, every, gate, mode="output", norms=False, backend=backend)
        want = (every.float() * gate).to(dtype)
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(bits(y)[~y.isnan()], bits(want)[~y.isnan()])


@pytest.mark.parametrize("mode", MODES)
def test_padding_may_hold_nan(backend, device, arguments, mode):
    x, out, gate, mask, dy, c1, c2 = arguments((2, 40, 64), masked=True)
    dropped = ~mask.unsqueeze(-1)
    call = functools.partial(run, functools.partial(gated_residual, backend=backend), mode)
    for junk in (float("nan"), float("inf")):
        bad = [torch.where(dropped, junk, t.detach()).requires_grad_() for t in (x, out)]
        for use in ("y-l1-l2", "l1-l2"):
            clean, dirty = (call(use, *pair, gate, mask, dy, c1, c2) for pair in ((x, out), bad))
            for name in ("l1", "l2", "dx", "dout"):
                assert torch.equal(clean[name], dirty[name]), name
            assert dirty["y"][dropped.expand_as(x)].isfinite().sum() == 0


@pytest.mark.parametrize("mode", MODES)
def test_kept_inf_and_nan_reach_the_sums_of_their_sequence(backend, arguments, mode):
    x, out, gate, mask, *_ = arguments((3, 40, 64), masked=True)
    token = int(mask[0].nonzero()[-1])
    mask[1, token] = True
    out = out.detach().clone()
    out[0, token, 3], out[1, token, 60] = float("inf"), float("nan")
    _, l1, l2 = gated_residual(x, out, gate, mode=mode, token_mask=mask, backend=backend)
    for norm in (l1, l2):
        assert norm[0].isinf()
        assert norm[1].isnan()
        assert norm[2].isfinite()


def test_infinite_difference_has_a_finite_l1_gradient(backend, arguments):
    x, out, gate, _, dy, c1, _ = arguments((2, 3, 8))
    out = torch.where(torch.arange(8, device=x.device) == 3, float("inf"), out.detach()).requires_grad_()
    got = run(functools.partial(gated_residual, backend=backend), "residual", "y-l1", x, out, gate, None, dy, c1, None)
    assert got["dx"].isfinite().all()


@pytest.mark.parametrize("use", ["y-l1-l2", "l1-l2"])
def test_no_difference_gives_no_penalty_gradient(backend, arguments, use):
    x, _, gate, _, dy, c1, c2 = arguments((2, 3, 8))
    out = x.detach().clone().requires_grad_()
    got = run(functools.partial(gated_residual, backend=backend), "output", use, x, out, gate, None, dy, c1, c2)
    assert torch.equal(got["dx"], torch.zeros_like(x))
    assert torch.equal(got["dout"], gate * dy if "y" in use else torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_of_ones_is_no_mask(backend, arguments, dtype):
    x, out, gate, _, dy, c1, c2 = arguments((2, 70, 130), dtype)
    call = functools.partial(run, functools.partial(gated_residual, backend=backend), "residual", "y-l1-l2")
    ones = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    plain, masked = (call(x, out, gate, mask, dy, c1, c2) for mask in (None, ones))
    for name, want in plain.items():
        if backend == "cpu" or name in ("y", "dx", "dout"):
            assert torch.equal(masked[name], want), name
        else:  # Triton cuts a masked sequence into tiles of whole tokens
            torch.testing.assert_close(masked[name], want)


def test_mask_broadcasts_as_torch_does(backend, device, arguments):
    x, out, gate, *_ = arguments((2, 3, 5, 16))
    for shape in ((), (5,), (3, 1), (2, 1, 1), (1, 3, 5)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(device) > 0.4
        full = mask.broadcast_to(2, 3, 5).contiguous()
        for got, want in zip(
            gated_residual(x, out, gate, mode="output", token_mask=mask, backend=backend),
            gated_residual(x, out, gate, mode="output", token_mask=full, backend=backend),
            strict=True,
        ):
            assert torch.equal(got, want)


# Who needs a gradient, mode, norms -> which inputs are kept for backward.
KEPT = [
    ("x out gate", "output", True, "x out gate mask"),
    ("x out gate", "output", False, "out gate"),
    ("x out gate", "residual", True, "x out gate mask"),
    ("x out gate", "residual", False, "x out gate"),
    ("x out", "output", False, "gate"),
    ("x out", "residual", False, "gate"),
    ("x out", "residual", True, "x out gate mask"),
    ("out", "output", True, "x out gate mask"),
    ("gate", "output", True, "out gate"),
    ("gate", "residual", True, "x out gate"),
]


@pytest.mark.parametrize(("needs", "mode", "norms", "kept"), KEPT)
def test_backward_keeps_only_inputs_it_needs(backend, arguments, needs, mode, norms, kept):
    x, out, gate, mask, dy, c1, c2 = arguments((2, 40, 130), masked=True)
    inputs = {"x": x, "out": out, "gate": gate, "mask": mask}
    for name in ("x", "out", "gate"):
        inputs[name].requires_grad_(name in needs.split())
    owners = {t.data_ptr(): name for name, t in inputs.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, l1, l2 = gated_residual(x, out, gate, mode=mode, norms=norms, token_mask=mask, backend=backend)
    # All saved storage is an input's storage, so there is no difference tensor.
    assert sorted(owners.get(t.data_ptr(), "new") for t in saved) == sorted(kept.split())
    tensors, incoming = ([y, l1, l2], [dy, c1, c2]) if norms and needs != "gate" else ([y], [dy])
    torch.autograd.backward(tensors, incoming)
    for name in ("x", "out", "gate"):
        depends = name in needs.split() and not (name == "x" and mode == "output" and not norms)
        assert (inputs[name].grad is not None) == depends


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("needs", ["x", "out", "gate", "x out", "x gate", "out gate"])
def test_partial_gradients_equal_the_full_ones(backend, arguments, mode, needs):
    x, out, gate, mask, dy, c1, c2 = arguments((2, 40, 130), masked=True)
    call = functools.partial(run, functools.partial(gated_residual, backend=backend), mode, "y-l1-l2")
    full = call(x, out, gate, mask, dy, c1, c2)
    for name, tensor in (("x", x), ("out", out), ("gate", gate)):
        tensor.requires_grad_(name in needs.split())
    y, l1, l2 = gated_residual(x, out, gate, mode=mode, token_mask=mask, backend=backend)
    pairs = [(t, g) for t, g in ((y, dy), (l1, c1), (l2, c2)) if t.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    for name, tensor in (("dx", x), ("dout", out), ("dgate", gate)):
        if not tensor.requires_grad:
            assert tensor.grad is None
        elif name == "dgate":  # without a penalty the mask is not used, and the sum is cut elsewhere
            torch.testing.assert_close(tensor.grad, full[name])
        else:
            assert torch.equal(tensor.grad, full[name]), name


def test_norms_depend_on_the_states_only(backend, arguments):
    x, out, gate, *_ = arguments((2, 3, 8))
    _, l1, l2 = gated_residual(x.detach(), out.detach(), gate, mode="residual", backend=backend)
    assert not l1.requires_grad
    assert not l2.requires_grad


@pytest.mark.parametrize("norms", [True, False])
def test_output_mode_without_norms_does_not_read_x(backend, arguments, norms):
    x, out, gate, _, dy, *_ = arguments((2, 3, 8))
    x = torch.full_like(x, float("nan"))
    y, l1, _ = gated_residual(x, out, gate, mode="output", norms=norms, backend=backend)
    grads = torch.autograd.grad(y, (out, gate), dy)
    for tensor in (y, *grads):
        assert tensor.isfinite().all()
    assert l1.isnan().all() if norms else l1 is None


@pytest.mark.parametrize("mode", MODES)
def test_inputs_stay_untouched_and_results_are_free(backend, arguments, mode):
    x, out, gate, mask, dy, c1, c2 = arguments((2, 40, 130), masked=True)
    copies = [t.detach().clone() for t in (x, out, gate, mask, dy, c1, c2)]
    y, l1, l2 = gated_residual(x, out, gate, mode=mode, token_mask=mask, backend=backend)
    y.add_(1.0)  # a model may write into its hidden states; nothing of ours needs them afterwards
    torch.autograd.backward([y, l1, l2], [dy, c1, c2])
    for tensor, copy in zip((x, out, gate, mask, dy, c1, c2), copies, strict=True):
        assert tensor._version == 0
        assert torch.equal(tensor, copy)


def test_second_derivatives_are_refused(backend, arguments):
    x, out, gate, _, dy, _, _ = arguments((2, 3, 8))
    y, _, _ = gated_residual(x, out, gate, mode="output", backend=backend)
    (dgate,) = torch.autograd.grad(y, gate, dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dgate.backward()


@pytest.mark.parametrize("mode", MODES)
def test_bits_repeat_and_do_not_depend_on_the_number_of_threads(backend, arguments, mode):
    case = arguments((2, 150 if backend == "cpu" else 9, 1031), masked=True)
    threads = torch.get_num_threads()
    call = functools.partial(run, functools.partial(gated_residual, backend=backend), mode, "y-l1-l2")
    seen = []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            seen.append(call(*case))
    finally:
        torch.set_num_threads(threads)
    for later in seen[1:]:
        for name, want in seen[0].items():
            assert torch.equal(later[name], want), name


def test_norms_equal_those_of_residual_norms(backend, arguments):
    x, out, gate, mask, _, c1, c2 = arguments((2, 70, 130), torch.bfloat16, masked=True)
    both = gated_residual(x, out, gate, mode="output", token_mask=mask, backend=backend)[1:]
    alone = residual_norms(x, out, token_mask=mask, backend=backend)
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    for a, b in zip(*(torch.autograd.grad(t, (x, out), (c1, c2)) for t in (both, alone)), strict=True):
        assert torch.equal(a, b)


def test_flushing_denormals_changes_nothing(backend, device, states):
    """torch.set_flush_denormal reaches the calling thread only, so a result that heeded it would depend on threads."""
    if device != "cpu" or backend != "cpu":
        pytest.skip("a setting of the processor that only C++ code meets")
    try:
        for dtype in DTYPES:
            x, out = (t * torch.finfo(dtype).smallest_normal for t in states((8, 256, 256), dtype, grad=False))
            gate = torch.tensor(0.3)
            x[0], out[0] = 0, 0
            out[0, 0, :8] = torch.finfo(torch.float32).smallest_normal / 1000  # a sum that is subnormal itself
            want = gated_residual(x, out, gate, mode="residual", backend=backend)
            assert (want[0] != 0).float().mean() > 0.8
            if not torch.set_flush_denormal(True):
                pytest.skip("this processor cannot flush denormals")
            got = gated_residual(x, out, gate, mode="residual", backend=backend)
            torch.set_flush_denormal(False)
            for a, b in zip(got, want, strict=True):
                assert torch.equal(bits(a), bits(b))
    finally:
        torch.set_flush_denormal(False)
