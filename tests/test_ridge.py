"""Ridge regression from sums against products and a solver in fp64."""

import pytest
import torch
from ridge import by_hand

from trsp_fast.engine.distributed import Group
from trsp_fast.ridge import MIXTURES, RIDGES, VALIDATION, Sums, best_change

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_sums_are_those_of_fp64(device, dtype):
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(300, 40, generator=draw).to(device, dtype)
    d = torch.randn(300, 24, generator=draw).to(device) * torch.logspace(-6, 6, 24).to(device)
    sums = Sums(40, 24, torch.device(device))
    for part in (slice(0, 100), slice(100, 100), slice(100, 300)):  # a part may have no window that judges
        sums.add(h[part], d[part], share=0.5)
    h, d = 0.5 * h.double(), d.double()
    for found, wanted in ((sums.a, h.T @ h), (sums.b, h.T @ d), (sums.c, d.pow(2).sum())):
        assert found.dtype == torch.float64
        error = (found - wanted).norm(dim=0) / wanted.norm(dim=0)  # by column: d's are of very different sizes
        assert error.max() < 2e-5


@pytest.mark.parametrize("noise", [0.1, 9.0, 24.0])  # with which ridges 1, 3 and 10 are taken
def test_few_mixtures_of_many_outputs_find_the_ridge(monkeypatch, noise):
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(32, 8, 60, generator=draw, dtype=torch.float64) * torch.logspace(0, -2, 60)
    d = h @ torch.randn(60, 512, generator=draw, dtype=torch.float64)
    d[..., 256:] += noise * torch.randn(32, 8, 256, generator=draw, dtype=torch.float64)  # any mixture has some of it
    judges, widths, solved = torch.arange(32) % VALIDATION == VALIDATION - 1, [], Sums.solved

    def of(windows):
        sums, inputs, lacking = Sums(60, 512, torch.device("cpu")), h[windows].flatten(0, 1), d[windows].flatten(0, 1)
        sums.a, sums.b = inputs.T @ inputs, inputs.T @ lacking
        return sums

    monkeypatch.setattr(Sums, "solved", lambda self, ridge: widths.append(self.b.shape[1]) or solved(self, ridge))
    found = best_change(of(~judges), of(judges), torch.device("cpu"), Group())
    torch.testing.assert_close(found.double(), by_hand(h, d), rtol=0, atol=1e-5)
    assert widths == [MIXTURES] * len(RIDGES) + [512]
