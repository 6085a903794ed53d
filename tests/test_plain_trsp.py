"""bench/plain_trsp.py is an oracle: where the recipes coincide, trsp_fast takes the same way, step by step.

Both do the same sums; what differs is their order (the fused gates and norms, how a batch is split). Measured: 0 to
1e-7 a step. Adam divides by the gradient's size, so rounding beside a zero gradient moves a weight by up to lr either
way, and losses may drift by more than their own rounding: hence 1e-4, which another recipe exceeds tenfold.
"""

import copy

import plain_trsp
import pytest
import torch

from trsp_fast.config import TRSPConfig
from trsp_fast.select import choose_layers
from trsp_fast.transfer import transfer

ROUNDING = 1e-4
# Penalties that weigh: at the paper's lambda2 a wrong D would hide below the tolerance.
LAMBDA1, LAMBDA2 = 0.05, 0.5


def config(**select):
    return TRSPConfig.from_preset(
        "paper", num_layers=3, data={"batch": 3}, select={"train_weights": True, "lambda1": LAMBDA1, **select},
        transfer={"lambda2": LAMBDA2, "lr": 1e-3, "epochs": 2},
    )  # fmt: skip


def deviations(history, losses):
    """By step, relative to the plain port's loss."""
    assert len(history) == len(losses)
    return [abs(entry["loss"] - loss) / abs(loss) for entry, loss in zip(history, losses, strict=True)]


@pytest.fixture
def models(llama):
    return llama, copy.deepcopy(llama)


@pytest.mark.parametrize("steps_per_round", [0, 5])
def test_stage_1_takes_the_same_way(models, tokens, steps_per_round):
    ours, plain = models
    selection = choose_layers(ours, tokens, config(steps_per_round=steps_per_round))
    layers, losses = plain_trsp.select(plain, tokens, 3, lambda1=LAMBDA1, batch=3, steps_per_round=steps_per_round)
    assert layers == selection.layers
    assert max(deviations(selection.history, losses)) < ROUNDING
    # the trained weights carry over, the gates and the bypass do not
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5 * 3)
    assert all("forward" not in layer.__dict__ and not layer._forward_hooks for layer in plain.model.layers)


def test_stage_1_with_frozen_weights_is_another_way(models, tokens):
    ours, plain = models
    selection = choose_layers(ours, tokens, config(train_weights=False))
    _, losses = plain_trsp.select(plain, tokens, 3, lambda1=LAMBDA1, batch=3)
    first, *others = deviations(selection.history, losses)
    assert first < ROUNDING  # the weights are still the same: what bench_step.py's gate rests on
    assert max(others) > 10 * ROUNDING


def test_stage_2_takes_the_same_way(models, tokens):
    ours, plain = models
    history = transfer(ours, tokens, [1, 2, 4], config())
    losses = plain_trsp.transfer(plain, tokens, [1, 2, 4], lambda2=LAMBDA2, lr=1e-3, batch=3, epochs=2)
    assert max(deviations(history, losses)) < ROUNDING
    assert all(entry["penalty"] > 100 * ROUNDING * entry["loss"] for entry in history)


@pytest.mark.parametrize("change", [{"lambda2": 0.51}, {"warmup": 0.5}, {"clip": 0.0}, {"detach_input": True}])
def test_stage_2_by_another_recipe_is_another_way(models, tokens, change):
    ours, plain = models
    settings = config().to_dict()
    settings["transfer"] |= change
    history = transfer(ours, tokens, [1, 2, 4], TRSPConfig.from_dict(settings))
    losses = plain_trsp.transfer(plain, tokens, [1, 2, 4], lambda2=LAMBDA2, lr=1e-3, batch=3, epochs=2)
    assert max(deviations(history, losses)) > 10 * ROUNDING


def test_both_stages_one_after_the_other(models, tokens):
    ours, plain = models
    selection = choose_layers(ours, tokens, config())
    history = transfer(ours, tokens, sorted(selection.layers), config())
    layers, _ = plain_trsp.select(plain, tokens, 3, lambda1=LAMBDA1, batch=3)
    losses = plain_trsp.transfer(plain, tokens, sorted(layers), lambda2=LAMBDA2, lr=1e-3, batch=3, epochs=2)
    assert max(deviations(history, losses)) < ROUNDING
