"""What only a GPU can show of the Triton backend: graphs, streams, sizes beyond 32 bits, and that nothing waits."""

import pytest
import torch

from trsp_fast.ops import gated_residual, residual_norms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
MODES = ["output", "residual"]


@pytest.fixture
def arguments(states, token_mask):
    def make(shape=(3, 70, 264), dtype=torch.bfloat16):
        x, out, dy = states(shape, dtype, device="cuda", count=3)
        gate = torch.tensor(0.7, device="cuda", requires_grad=True)
        return x, out, gate, token_mask(shape, device="cuda"), dy.detach()

    return make


def step(mode, x, out, gate, mask, dy):
    """Forward and backward with everything switched on."""
    y, l1, l2 = gated_residual(x, out, gate, mode=mode, token_mask=mask, backend="triton")
    n1, n2 = residual_norms(x, out, backend="triton")
    ones = torch.ones_like(l1)
    grads = torch.autograd.grad((y, l1, l2, n1, n2), (x, out, gate), (dy, ones, ones, ones, ones))
    return (y.detach(), l1.detach(), l2.detach(), n1.detach(), n2.detach(), *grads)


@pytest.mark.parametrize("mode", MODES)
def test_a_captured_graph_replays_on_new_values(arguments, mode):
    static = arguments()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which a capture must not do
        step(mode, *static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(mode, *static)
    for scale in (0.5, -2.0):
        with torch.no_grad():
            for tensor in (static[0], static[1], static[4]):
                tensor.mul_(scale)
            static[2].fill_(scale)
        graph.replay()
        for got, want in zip(captured, step(mode, *static), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_a_side_stream_gives_the_same_bits(arguments, mode):
    case = arguments((8, 512, 1024))
    want = step(mode, *case)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = step(mode, *case)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_device(arguments, mode):
    case = arguments()
    step(mode, *case)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(mode, *case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_with_inductor(arguments, mode, dynamic):
    def loss(x, out, gate, mask):
        y, l1, l2 = gated_residual(x, out, gate, mode=mode, token_mask=mask)
        return y.float().square().sum() + (l1 + l2.sqrt()).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
    for shape in ((3, 70, 264), (2, 33, 100)):
        x, out, gate, mask, _ = arguments(shape)
        got, want = (torch.autograd.grad(f(x, out, gate, mask), (x, out, gate)) for f in (compiled, loss))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_more_than_two_to_the_31_elements(masked):
    shape = (2, 2**20 + 3, 1024)
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    torch.use_deterministic_algorithms(False)  # the fixture's poison would double the time
    x, out = (
        torch.zeros(shape, dtype=torch.bfloat16, device="cuda"),
        torch.ones(shape, dtype=torch.bfloat16, device="cuda"),
    )
    out[-1, -1] = 3.0
    mask = torch.ones(shape[:-1], dtype=torch.bool, device="cuda") if masked else None
    gate = torch.tensor([1.0, 0.5], device="cuda")
    y, l1, l2 = gated_residual(x, out, gate, mode="residual", token_mask=mask)
    each = shape[1] * shape[2]
    assert l1.tolist() == pytest.approx([each, each + 2 * 1024])
    assert l2.tolist() == pytest.approx([each, each + 8 * 1024])
    assert y[-1, -1].unique().tolist() == [1.5]
    assert y[-1, 0].unique().tolist() == [0.5]
    assert y[0, -1].unique().tolist() == [1.0]
