"""The second look at earlier choices, against the same written out on copies of the model."""

import copy

import pytest
import torch
from tiny import tiny_llama

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.distributed import Group
from trsp_fast.engine.objective import mean_loss
from trsp_fast.engine.session import Session
from trsp_fast.errors import Interrupted
from trsp_fast.models.gates import bypassed
from trsp_fast.run.events import Events
from trsp_fast.run.state import Keeper, StateStore, Stop
from trsp_fast.select import choose_layers, race, trsp
from trsp_fast.select.stand_in import StandIns


@pytest.fixture
def tokens():
    return torch.randint(0, 90, (16, 24), generator=torch.Generator().manual_seed(1))


REGRETFUL = {"cut": 12, "fold": 6}  # seeds where both earlier choices are taken back once the others are gone


def regretful(judge):
    return of_large_weights(REGRETFUL[judge])


def of_large_weights(seed):
    """7 layers of which each changes a lot what the others do."""
    model, generator = tiny_llama(7), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.16)
    return model.eval()


def settings(num_layers=3, **select):
    select = {"steps_per_round": 1, "shortlist": 16, **select}
    return TRSPConfig.from_dict({"num_layers": num_layers, "data": {"batch": 4}, "select": select})


def loss_without(model, tokens, others, layer, judge):
    """Of `layer` judged last, the others gone in their order, each folded as it was when it went."""
    model, gone, judging = copy.deepcopy(model), [], tokens
    for one in [*others, layer]:
        if judge == "fold":
            judging = tokens[1::2]
            with bypassed(model, gone):
                made = StandIns(model, tokens, Group()).of([one])
            for stand_in in made.values():
                model.model.layers[stand_in.below].mlp.down_proj.weight.data += stand_in.change.amounts[0]
        gone.append(one)
    with bypassed(model, gone):
        return mean_loss(model, judging)


@pytest.mark.parametrize("judge", ["cut", "fold"])
def test_each_earlier_choice_is_raced_again_with_the_others_gone(tokens, judge, monkeypatch):
    monkeypatch.setattr(race, "REACH", 1e9)  # all candidates on all windows: all are close
    model = regretful(judge)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    greedy = choose_layers(model, tokens, settings(judge=judge, exchange=False))
    wanted = list(greedy.layers)
    for position in range(2):
        others = [layer for layer in wanted if layer != wanted[position]]
        losses = {layer: loss_without(model, tokens, others, layer, judge) for layer in range(7) if layer not in others}
        wanted[position] = min(losses, key=losses.get)
    assert all(layer != old for layer, old in zip(wanted[:2], greedy.layers[:2], strict=True))
    found = choose_layers(model, tokens, settings(judge=judge))
    assert found.layers == wanted
    looks = [entry for entry in found.rounds if "instead_of" in entry]
    assert [entry["instead_of"] for entry in looks] == greedy.layers[:2]
    assert [entry["layer"] for entry in looks] == wanted[:2]
    assert looks[1]["judged"][wanted[1]]["loss"] == pytest.approx(losses[wanted[1]], rel=1e-6)
    assert found.rounds[:3] == greedy.rounds
    assert found.window_forwards > greedy.window_forwards
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("judge", "reach", "layers", "after"),
    [
        ("cut", 1e9, 3, 1),
        ("fold", 1e9, 4, 1),
        ("fold", 1e9, 4, 2),  # two layers are folded already where it goes on
        ("fold", 1e9, 4, 3),
        ("cut", 0.5, 3, 1),  # the second choice was clear, and is looked at because the first one has changed
    ],
)
def test_an_interrupted_look_goes_on_where_it_was(tokens, judge, reach, layers, after, tmp_path, monkeypatch):
    monkeypatch.setattr(race, "REACH", reach)
    model, config = regretful(judge), settings(layers, judge=judge)
    want, stop, looks = choose_layers(model, tokens, config), Stop(), []

    def listen(kind, _values):
        if kind == "exchange":
            looks.append(kind)
            if len(looks) == after:
                stop.code = 143

    with pytest.raises(Interrupted):
        choose_layers(
            model, tokens, config, session=Session(Events(listen), keeper=Keeper(StateStore(tmp_path), stop=stop))
        )
    assert len(looks) == after
    again = []
    events = Events(lambda kind, _values: again.append(kind))
    found = choose_layers(model, tokens, config, session=Session(events, keeper=Keeper(StateStore(tmp_path))))
    assert (found.layers, found.rounds, found.window_forwards) == (want.layers, want.rounds, want.window_forwards)
    assert again.count("exchange") == layers - 1 - after
    assert again.count("round") == again.count("select_step") == 0


def test_what_is_fitted_for_a_look_is_part_of_the_cost(tokens, monkeypatch):
    monkeypatch.setattr(race, "REACH", 1e9)
    fits, original = [], StandIns._sums

    def dear(self, places):
        fits.append(places)
        self.cost += 10_000 - len(self.tokens)
        return original(self, places)

    monkeypatch.setattr(StandIns, "_sums", dear)
    found = choose_layers(regretful("fold"), tokens, settings(4, judge="fold"))
    assert found.window_forwards // 10_000 == len(fits)
    assert len(fits) > 4 + 3 + (3 + 2 + 1)  # a round, a look, what is above it, and what below it stays


def test_only_those_within_reach_come_back(tokens, monkeypatch):
    model = regretful("cut")
    monkeypatch.setattr(race, "REACH", -1e9)  # nobody is: no look takes anything
    found = choose_layers(model, tokens, settings(judge="cut"))
    assert all(entry["close"] == [entry["layer"]] for entry in found.rounds)
    assert len(found.rounds) == 3


@pytest.mark.parametrize(
    ("seed", "close", "looks"),
    [
        (2, [[0, 6], [3]], [(0, 6, 6)]),  # the second choice was clear
        (12, [[3, 5], [5]], [(0, 3, 0), (1, 5, 5)]),  # but another layer has gone instead of the first one since
        (6, [[2, 3], [1]], []),  # whoever was close was chosen later
    ],
)
def test_a_clear_choice_is_looked_at_only_once_an_earlier_one_has_changed(tokens, seed, close, looks, monkeypatch):
    monkeypatch.setattr(race, "REACH", 0.5)
    found = choose_layers(of_large_weights(seed), tokens, settings(judge="cut"))
    assert [entry["close"] for entry in found.rounds[:2]] == close
    assert [(entry["position"], entry["instead_of"], entry["layer"]) for entry in found.rounds[3:]] == looks


@pytest.mark.parametrize("select", [{"schedule": "oneshot"}, {"shortlist": 0}, {"exchange": False}])
def test_where_there_are_no_looks(tokens, select, monkeypatch):
    monkeypatch.setattr(race, "REACH", 1e9)
    found = choose_layers(regretful("cut"), tokens, settings(**select))
    assert not [entry for entry in found.rounds if "instead_of" in entry]


@pytest.mark.parametrize("begun", [{"exchange": False}, {"schedule": "oneshot"}])
def test_a_run_that_was_begun_with_other_settings_goes_on(tokens, begun, tmp_path, monkeypatch):
    """As `--accept-changes` allows: of a version whose rounds do not say who was close, or all chosen in one round."""
    stop = Stop()
    events = Events(lambda kind, _values: setattr(stop, "code", 143) if kind == "round" else None)
    session = Session(events, keeper=Keeper(StateStore(tmp_path), stop=stop))
    with monkeypatch.context() as older:
        if "exchange" in begun:
            older.setattr(trsp, "told", lambda *_: {"judged": {}, "folded": []})
        with pytest.raises(Interrupted):
            choose_layers(regretful("cut"), tokens, settings(judge="cut", **begun), session=session)
    session = Session(Events(), keeper=Keeper(StateStore(tmp_path)))
    found = choose_layers(regretful("cut"), tokens, settings(judge="cut"), session=session)
    assert len(set(found.layers)) == 3
    assert len([entry for entry in found.rounds if "gate" in entry]) == 3
