"""plan: what a forecast counts, whatever this machine's speed."""

import pytest
import torch
from tiny import tiny_llama

from trsp_fast import plan
from trsp_fast.config import TRSPConfig

SECOND = 1.0  # a forward pass of one window of the whole model


@pytest.mark.parametrize(("fold", "epochs", "passes"), [("none", 1, 0), ("start", 1, 2), ("alone", 0, 2)])
def test_a_fold_counts_two_passes_of_the_shorter_model_and_one_of_the_untouched(monkeypatch, fold, epochs, passes):
    monkeypatch.setattr(plan, "_seconds_of_a_window", lambda *_: SECOND)
    monkeypatch.setattr(plan, "_seconds_per_step", lambda *_: 10.0)
    tokens = torch.randint(0, 97, (8, 16), generator=torch.Generator().manual_seed(0))
    transfer = {"fold": fold, "epochs": epochs, "gate": "anneal", "hold": 1.0}
    config = TRSPConfig.from_dict({"layers": [1, 4, 5], "data": {"batch": 4}, "transfer": transfer})
    found = plan.forecast(tiny_llama(6), tokens, config)
    training = 0 if fold == "alone" else 2 * 10.0  # 8 windows, 4 a step
    folding = 8 * SECOND * (passes * 3 / 6 + 1) if passes else 0.0
    assert found.seconds["stage 2"] == training + folding
    assert found.steps["stage 2"] == (0 if fold == "alone" else 2)


@pytest.mark.parametrize(
    ("shortlist", "judge", "raced", "looked"),
    [
        (0, "fold", 0.0, 0.0),
        (4, "cut", 8 * 4 * 0.55 + 24, 3 * 24 * 0.55),
        (4, "fold", 12 + 8 * 4 * 0.55 + 12, 2 * 12 + 3 * 12 * 0.55),
    ],
)
@pytest.mark.parametrize("exchange", [True, False])
def test_a_round_counts_its_steps_and_its_race(monkeypatch, shortlist, judge, raced, looked, exchange):
    """Rounds of 6 and 5 layers, each its share of the weights; the shortlist first on 8 of the windows.

    A fold is fitted to half of the 24 windows, and the second look at the first choice fits both again.
    """
    monkeypatch.setattr(plan, "_seconds_of_a_window", lambda *_: SECOND)
    monkeypatch.setattr(plan, "_seconds_per_step", lambda *_: 10.0)
    monkeypatch.setattr(plan, "_share", lambda _, alive: alive / 6)
    tokens = torch.randint(0, 97, (24, 16), generator=torch.Generator().manual_seed(0))
    select = {"shortlist": shortlist, "judge": judge, "steps_per_round": 3, "exchange": exchange}
    config = TRSPConfig.from_dict({"num_layers": 2, "select": select, "transfer": {"epochs": 0, "fold": "none"}})
    found = plan.forecast(tiny_llama(6), tokens, config)
    rounds = (1 + 5 / 6) * (3 * 10.0 + raced * SECOND)
    assert found.seconds["stage 1"] == pytest.approx(
        rounds + (5 / 6 * 0.5 * looked * SECOND if exchange else 0.0), abs=0.06
    )
    assert found.steps["stage 1"] == 6
