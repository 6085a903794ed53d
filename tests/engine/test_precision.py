import pytest
import torch

from trsp_fast.engine.objective import WindowOrder, distillation_loss, mean_loss
from trsp_fast.engine.precision import SourceWeights, cast_parameters


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16])
def test_untrained_weights_come_back_with_their_bytes(llama, source, run):
    model = llama.to(source)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights = SourceWeights(model, run)
    cast_parameters(model, run)
    changed = model.model.layers[0].mlp.up_proj.weight
    changed.data[0, 0] = 7.0
    weights.restore(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == source
        if parameter is changed:
            assert parameter[0, 0] == 7.0
        else:
            assert torch.equal(parameter, before[name]), name


def test_distillation_loss_is_the_mean_kl_divergence():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    p = teacher.double().softmax(-1)
    expected = (p * (p.log() - student.double().log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher).double(), expected, rtol=1e-5, atol=1e-6)


def test_mean_loss_does_not_depend_on_the_batch(llama, tokens):
    with torch.no_grad():
        expected = float(llama(input_ids=tokens, labels=tokens).loss)
    assert mean_loss(llama, tokens, 3) == pytest.approx(expected, rel=1e-5)


def test_every_pass_visits_every_window_once_and_a_step_does_not_depend_on_the_steps_before():
    order = WindowOrder(8, 3, seed=4)
    passes = [torch.cat([order.rows(step) for step in range(first, first + 3)]) for first in (0, 3)]
    for rows in passes:
        assert sorted(rows.tolist()) == list(range(8))
    assert not torch.equal(*passes)
    assert torch.equal(WindowOrder(8, 3, seed=4).rows(4), order.rows(4))
