"""The race of a shortlist: who goes early, on which windows, and that the best of all windows wins."""

import itertools
import math

import pytest
import torch

from trsp_fast.engine.distributed import Group
from trsp_fast.engine.objective import mean_loss
from trsp_fast.models.gates import bypassed
from trsp_fast.select import race as racing
from trsp_fast.select.race import heats, race, within_reach
from trsp_fast.select.sleb import Judgement


def losses(mean, shared, own, seed):
    """Windows that differ by `shared`, alike for all candidates, and by `own`, drawn by `seed`."""
    windows = torch.randn(32, generator=torch.Generator().manual_seed(99), dtype=torch.float64) * shared
    return mean + windows + torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * own


@pytest.mark.parametrize("count", [1, 5, 8, 9, 31, 32, 54, 128, 1000])
def test_heats_are_disjoint_and_spread_over_all_windows(count):
    parts = [list(range(count))[part] for part in heats(count)]
    assert sorted(index for part in parts for index in part) == list(range(count))
    assert min(count, racing.FIRST // 2) <= len(parts[0]) <= racing.FIRST
    seen = []
    for part in parts:
        assert len(part) <= len(seen) or not seen
        seen = sorted([*seen, *part])
        assert len({after - before for before, after in itertools.pairwise(seen)}) <= 1  # evenly


def test_what_all_windows_share_does_not_hide_a_difference():
    """0.05 between candidates where windows differ by 1: each loss alone is known to 0.18."""
    assert within_reach({4: losses(2.0, 1.0, 0.05, 1), 7: losses(2.05, 1.0, 0.05, 2)}, 1) == [4]


def test_who_may_still_be_the_best_stays():
    close = {4: losses(2.0, 1.0, 0.05, 1), 7: losses(2.01, 1.0, 0.05, 2), 5: losses(2.4, 1.0, 0.05, 3)}
    assert within_reach(close, 1) == [4, 7]
    assert within_reach(close, 2) == [4, 7]
    assert within_reach({5: close[5], 7: close[7]}, 2) == [5, 7]


def test_with_two_wanted_the_second_is_the_mark():
    three = {1: losses(2.5, 1.0, 0.05, 1), 2: losses(2.0, 1.0, 0.05, 2), 3: losses(2.505, 1.0, 0.05, 3)}
    assert within_reach(three, 1) == [2]
    assert within_reach(three, 2) == [1, 2, 3]


def test_one_window_or_equal_losses_decide_nothing_wrongly():
    one = {0: torch.tensor([1.0], dtype=torch.float64), 1: torch.tensor([2.0], dtype=torch.float64)}
    assert within_reach(one, 1) == [0, 1]  # no spread is known
    same = losses(2.0, 1.0, 0.05, 1)
    assert within_reach({0: same, 1: same.clone()}, 1) == [0, 1]
    assert within_reach({0: same, 1: same + 0.1}, 1) == [0]


def test_a_loss_that_is_not_finite_loses():
    """Without some layers fp16 overflows: whoever can be computed is better, and none goes while all overflow."""
    fine, wild = losses(2.0, 1.0, 0.05, 1), losses(1.0, 1.0, 0.05, 2)
    wild[3] = math.nan
    assert within_reach({0: wild, 1: fine}, 1) == [1]
    assert within_reach({0: wild, 1: fine}, 2) == [0, 1]
    assert within_reach({0: wild, 1: wild.clone(), 2: fine}, 2) == [0, 1, 2]
    assert racing.Race({0: wild, 1: fine}).ranked == [1, 0]
    assert racing.Race({0: torch.cat([wild, wild]), 1: fine}).ranked == [1, 0]  # even where it ran further


class Judge:
    """In place of passes: the loss of a window, whose first token is its number, by layer; and what was asked."""

    def __init__(self, monkeypatch, table):
        self.table, self.asked = table, []
        monkeypatch.setattr(racing, "judge_layers", self)

    def __call__(self, model, tokens, gone, layers, stand_ins):
        windows = tokens[:, 0].tolist()
        self.asked.append((windows, list(layers)))
        return Judgement({layer: self.table[layer][windows] for layer in layers}, len(windows) * len(layers))


def numbered(count):
    return torch.arange(count)[:, None].expand(-1, 8)


def test_the_best_of_all_windows_wins_and_no_window_is_run_twice(monkeypatch):
    """Of 128 windows every fourth speaks for layer 4, a little: with 32 it leads, with all layer 1 is better."""
    own = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    behind = 0.05 * (own[0] - own[0].mean(1, keepdim=True)) + torch.tensor([[-0.005], [0.015], [0.015], [0.015]])
    one = 2 + own[1].flatten()
    table = {1: one, 4: one + behind.t().flatten(), 2: one + 0.5 + 0.1 * own[0].flatten()}
    judge = Judge(monkeypatch, table)
    monkeypatch.setattr(racing, "FIRST", 32)
    found = race(None, numbered(128), [2, 4, 1], 1, Group())
    assert found.ranked == [1, 4, 2]
    assert {layer: len(losses) for layer, losses in found.losses.items()} == {1: 128, 4: 128, 2: 32}
    assert [layers for _, layers in judge.asked] == [[2, 4, 1], [4, 1], [4, 1]]
    windows = [window for windows, _ in judge.asked for window in windows]
    assert sorted(windows) == list(range(128))
    assert torch.equal(found.losses[4], table[4][windows])
    assert found.cost == 32 * 3 + 96 * 2


def test_a_decided_race_ends(monkeypatch):
    own = torch.randn(2, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.05
    judge = Judge(monkeypatch, {0: 2.2 + own[0], 3: 2.0 + own[1]})
    assert race(None, numbered(128), [0, 3], 1, Group()).ranked == [3, 0]
    assert len(judge.asked) == 1
    # both are wanted: their order is that of the first heat
    assert race(None, numbered(128), [0, 3], 2, Group()).ranked == [3, 0]
    assert len(judge.asked) == 2


def test_a_race_of_all_layers_is_one_round_of_sleb(llama, monkeypatch):
    """Random layers on random tokens lie close together: all windows are needed, and some layers go early."""
    monkeypatch.setattr(racing, "FIRST", 8)
    tokens = torch.randint(0, 97, (64, 16), generator=torch.Generator().manual_seed(1))
    found, whole = race(llama, tokens, list(range(6)), 1, Group()), {}
    for layer in range(6):
        with bypassed(llama, [layer]):
            whole[layer] = mean_loss(llama, tokens)
    assert found.ranked[0] == min(whole, key=whole.get)
    ran = {layer: len(losses) for layer, losses in found.losses.items()}
    assert max(ran.values()) == 64
    for layer in (layer for layer in ran if ran[layer] == 64):
        assert float(found.losses[layer].mean()) == pytest.approx(whole[layer], rel=1e-6)
    assert found.cost < 64 * 6
