"""What holds for any hidden states, sizes, masks and gates; hypothesis looks for a counterexample."""

import dataclasses

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trsp_fast.ops import backends, gated_residual, residual_norms

# The interpreter runs a kernel program by program in Python: fewer and smaller examples there.
EXAMPLES = 12 if backends.INTERPRETED else 80
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = ["output", "residual"]


@dataclasses.dataclass
class Case:
    """Hidden states of one shape and dtype, with values from tiny to huge, and a mask that keeps some tokens."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    mode: str
    seed: int
    magnitude: float

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        self.x, self.out, self.dy = (
            (torch.randn(self.shape, generator=generator) * self.magnitude).to(self.dtype) for _ in range(3)
        )
        self.mask = torch.rand(self.shape[:-1], generator=generator) > 0.4
        self.order = torch.randperm(self.shape[1], generator=generator)

    def to(self, device):
        self.x, self.out, self.dy, self.mask, self.order = (
            t.to(device) for t in (self.x, self.out, self.dy, self.mask, self.order)
        )
        return self


cases = st.builds(
    Case,
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.one_of(st.integers(1, 200), st.sampled_from([256, 512]))),
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**32 - 1),
    magnitude=st.sampled_from([1e-3, 1.0, 100.0]),
)


def for_all_cases(test):
    """Runs test(backend, case) over examples of every backend."""

    def run(backend, device):
        @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
        @given(cases)
        def examples(case):
            test(backend, case.to(device))

        examples()

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def bits(tensor):
    return tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def constant(value, like):
    return torch.tensor(value, device=like.device)


@for_all_cases
def test_gate_one_is_out_and_gate_zero_is_x(backend, case):
    one, zero = (constant(value, case.x) for value in (1.0, 0.0))
    assert torch.equal(bits(gated_residual(case.x, case.out, one, mode=case.mode, backend=backend)[0]), bits(case.out))
    y = gated_residual(case.x, case.out, zero, mode="residual", backend=backend)[0]
    assert torch.equal(bits(y), bits(case.x))


@for_all_cases
def test_a_mask_of_ones_is_no_mask(backend, case):
    """To the bit for y and its part of the gradients; the sums may be cut into other tiles."""
    gate, ones = constant(0.7, case.x).requires_grad_(), torch.ones_like(case.mask)
    results = []
    for mask in (None, ones):
        x, out = leaves(case.x, case.out)
        y, l1, l2 = gated_residual(x, out, gate, mode=case.mode, token_mask=mask, backend=backend)
        grads = torch.autograd.grad((y, l1, l2), (x, out), (case.dy, torch.ones_like(l1), torch.ones_like(l2)))
        results.append((y, *grads, l1, l2))
    for without, with_ones in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(without, with_ones)
    for without, with_ones in zip(results[0][3:], results[1][3:], strict=True):
        torch.testing.assert_close(without, with_ones, rtol=1e-6, atol=0)


@for_all_cases
def test_the_order_of_tokens_changes_sums_by_rounding_only(backend, case):
    before = residual_norms(case.x, case.out, token_mask=case.mask, backend=backend)
    x, out, mask = (t[:, case.order] for t in (case.x, case.out, case.mask))
    after = residual_norms(x, out, token_mask=mask, backend=backend)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@for_all_cases
def test_no_difference_gives_finite_gradients(backend, case):
    """Through the square root of D as stage 2 takes it: its own gradient at 0 is guarded, ours must not add a NaN."""
    gate = constant(0.3, case.x).requires_grad_()
    x, out = leaves(case.x, case.x)
    y, l1, l2 = gated_residual(x, out, gate, mode=case.mode, token_mask=case.mask, backend=backend)
    assert not l1.any()
    assert not l2.any()
    incoming = (case.dy, torch.ones_like(l1), torch.full_like(l2, 1e30))
    for gradient in torch.autograd.grad((y, l1, l2), (x, out, gate), incoming):
        assert gradient.isfinite().all()


@for_all_cases
def test_what_is_dropped_is_never_seen_and_what_is_kept_always(backend, case):
    """NaN in one token: in the sums of its sequence if it is kept, nowhere if it is not."""
    x, out = case.x.clone(), case.out.clone()
    x[0, 0, 0] = float("nan")
    out[-1, -1, -1] = float("inf")
    l1, l2 = residual_norms(x, out, token_mask=case.mask, backend=backend)
    _, g1, g2 = gated_residual(x, out, constant(0.5, x), mode=case.mode, token_mask=case.mask, backend=backend)
    poisoned = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    poisoned[0] |= case.mask[0, 0]
    poisoned[-1] |= case.mask[-1, -1]
    for sums in (l1, l2, g1, g2):
        assert torch.equal(~sums.isfinite(), poisoned)


@for_all_cases
def test_a_dropped_token_has_no_part_in_the_penalty(backend, case):
    gate = constant(0.7, case.x)
    x, out = leaves(case.x, case.out)
    x.data[~case.mask] = float("nan")
    l1, l2 = gated_residual(x, out, gate, mode=case.mode, token_mask=case.mask, backend=backend)[1:]
    for gradient in torch.autograd.grad((l1, l2), (x, out), (torch.ones_like(l1), torch.ones_like(l2))):
        assert not gradient[~case.mask].any()
        assert gradient.isfinite().all() or case.dtype == torch.float16


@for_all_cases
def test_inputs_are_left_alone(backend, case):
    gate = constant(0.7, case.x).requires_grad_()
    x, out = leaves(case.x, case.out)
    inputs = (x, out, gate, case.mask, case.dy)
    before = [(t.detach().clone(), t._version) for t in inputs]
    y, l1, l2 = gated_residual(x, out, gate, mode=case.mode, token_mask=case.mask, backend=backend)
    y.detach().fill_(0)  # a result is nobody else's memory
    torch.autograd.grad((y, l1, l2), (x, out, gate), (case.dy, l1.detach(), l2.detach()))
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


def test_hypothesis_is_not_idle():
    """The strategies reach both modes, all dtypes, one token and several tiles."""
    seen = []

    @settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(cases)
    def collect(case):
        seen.append(case)

    collect()
    assert {case.mode for case in seen} == set(MODES)
    assert {case.dtype for case in seen} == set(DTYPES)
    assert any(case.x[0].numel() > 4096 for case in seen)
    assert any(case.x[0].shape[0] == 1 for case in seen)
