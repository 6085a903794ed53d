"""Candidates that are judged by their fold: the change against ridge regression written out, and what it decides."""

import copy
import dataclasses

import pytest
import torch
from ridge import by_hand
from tiny import tiny_llama
from zoo import build

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.distributed import Group
from trsp_fast.engine.objective import mean_loss
from trsp_fast.engine.session import Session
from trsp_fast.engine.teacher import InputTap
from trsp_fast.errors import Interrupted
from trsp_fast.fold import projections
from trsp_fast.models.gates import bypassed
from trsp_fast.run.events import Events
from trsp_fast.run.state import Keeper, StateStore, Stop
from trsp_fast.select import choose_layers, race, stand_in
from trsp_fast.select.sleb import judge_layers, plain_by_window
from trsp_fast.select.stand_in import StandIns


@pytest.fixture
def tokens():
    return torch.randint(0, 90, (32, 32), generator=torch.Generator().manual_seed(1))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def untouched(model, before):
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("family", "share"), [("llama", 1.0), ("gpt2", 1.0), ("phi", 1.0), ("granite", 0.5)])
def test_the_change_is_ridge_regression_on_what_the_layer_did(tokens, family, share):
    """Layer 3 is gone already: layer 4 stands on layer 2, and what it did reaches to layer 5.

    A layer may hand on a share of what its projection gives.
    """
    model = build(family).double() if family != "llama" else tiny_llama(8).double()
    module, seen, fitted = projections(model, tokens[:1])[2], {}, tokens[::2]
    with bypassed(model, [3]):
        handle = module.register_forward_hook(lambda _module, args, _output: seen.update(h=args[0].detach()))
        with InputTap(model, [4, 5]) as tap, torch.no_grad():
            model(input_ids=fitted, use_cache=False)
            did = (tap.taken[5] - tap.taken[4]).double()
        handle.remove()
        h = seen["h"]
        if module.bias is not None:
            h = torch.cat([h, h.new_ones(*h.shape[:2], 1)], dim=2)
        expected = by_hand(h * share, did)
        made = StandIns(model, tokens, Group()).of([1, 4])
    assert set(made) == {1, 4}
    assert made[4].below == 2
    weight, *bias = made[4].change.amounts
    weight = weight.T if isinstance(module, torch.nn.Linear) else weight
    torch.testing.assert_close(weight.double(), expected[: len(weight)], rtol=1e-3, atol=1e-5)
    assert len(bias) == (module.bias is not None)
    for amount in bias:
        torch.testing.assert_close(amount.double(), expected[-1], rtol=1e-3, atol=1e-5)


def test_each_is_the_same_whoever_else_is_asked_for_and_however_many_fit(llama, tokens, monkeypatch):
    together = StandIns(llama, tokens, Group()).of([1, 2, 3, 4, 5])
    alone = {layer: StandIns(llama, tokens, Group()).of([layer])[layer] for layer in together}
    monkeypatch.setattr(stand_in, "SUMS_SHARE", 0.0)  # one at a time
    makes = StandIns(llama, tokens, Group())
    one_by_one = makes.of([1, 2, 3, 4, 5])
    assert makes.cost >= 5 * 16
    for other in (alone, one_by_one):
        assert set(other) == set(together)
        for layer, made in together.items():
            assert torch.equal(made.change.amounts[0], other[layer].change.amounts[0])


def test_windows_that_fit_are_spread_over_all_and_the_others_judge(llama):
    """At most 32, and at most half."""
    for samples, fitted in ((100, [index * 100 // 32 for index in range(32)]), (9, [0, 2, 4, 6]), (1, [])):
        tokens = torch.arange(samples)[:, None].expand(-1, 8) % 90
        makes = StandIns(llama, tokens, Group())
        assert makes.tokens[:, 0].tolist() == [index % 90 for index in fitted]
        assert makes.others[:, 0].tolist() == [index % 90 for index in range(samples) if index not in fitted]


def test_a_candidate_is_judged_with_its_change_in_place_and_the_weights_come_back(llama, tokens):
    before = weights(llama)
    made = StandIns(llama, tokens, Group()).of([1, 2, 4, 5])
    layers = [5, 0, 2, 4, 1]
    judged = judge_layers(llama, tokens, [], layers, made)
    whole = plain_by_window(llama, tokens, [], layers, made)
    assert untouched(llama, before)
    assert all(torch.equal(judged.by_window[layer], whole[layer]) for layer in layers)
    assert judged.cost < 32 * 5
    for layer in layers:
        other = copy.deepcopy(llama)
        if layer in made:
            other.model.layers[layer - 1].mlp.down_proj.weight.data += made[layer].change.amounts[0]
        with bypassed(other, [layer]):
            assert judged.losses[layer] == pytest.approx(mean_loss(other, tokens), rel=1e-6)
    cut = judge_layers(llama, tokens, [], layers)
    assert cut.losses[0] == judged.losses[0]
    assert cut.losses[4] != judged.losses[4]


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_where_the_output_is_no_sum_the_cut_is_judged(tokens, family):
    """A norm behind the projection, or experts in one tensor."""
    model = build(family)
    makes = StandIns(model, tokens, Group())
    assert makes.of([2, 3]) == {}
    assert makes.obstacle() == "no layer ends with a projection of its own that is added to the states"


def test_a_shared_bias_stays_as_it_is(tokens):
    model = build("gpt2")
    for block in model.transformer.h:
        block.mlp.c_proj.bias = model.transformer.h[0].mlp.c_proj.bias
    assert {len(made.change.parameters) for made in StandIns(model, tokens, Group()).of([1, 2]).values()} == {1}


def test_all_processes_count(llama, tokens, monkeypatch):
    alone, two = StandIns(llama, tokens, Group()), Group()
    two.size = 2
    assert StandIns(llama, tokens, two).cost == 2 * alone.cost == 2 * (1 + 2 * (1 + 2 + 3 + 4 + 5 + 6) / 6)


def test_an_error_while_it_is_put_in_place_leaves_no_trace(tokens):
    model = build("gpt2")
    made, before = StandIns(model, tokens, Group()).of([2])[2], weights(model)
    broken = dataclasses.replace(made.change, amounts=(made.change.amounts[0], torch.zeros(3)))
    with pytest.raises(RuntimeError), stand_in.StandIn(made.below, broken).in_place():
        pass
    assert untouched(model, before)


def settings(**select):
    select = {"steps_per_round": 1, "shortlist": 6, **select}
    return TRSPConfig.from_dict({"num_layers": 2, "data": {"batch": 4}, "select": select})


def test_each_round_takes_the_best_folded_one_on_the_model_that_the_last_one_left(llama, tokens, monkeypatch):
    monkeypatch.setattr(race, "REACH", 1e9)  # all candidates on all windows
    before, model, chosen = weights(llama), copy.deepcopy(llama), []
    for _ in range(2):
        alive, losses = [layer for layer in range(1, 6) if layer not in chosen], {}  # layer 0 has none below it
        with bypassed(model, chosen):
            made = StandIns(model, tokens, Group()).of(alive)
        for layer in alive:
            other = copy.deepcopy(model)
            if layer in made:
                other.model.layers[made[layer].below].mlp.down_proj.weight.data += made[layer].change.amounts[0]
            with bypassed(other, [*chosen, layer]):
                losses[layer] = mean_loss(other, tokens[1::2])  # the windows that no change is fitted to
        best = min(losses, key=losses.get)
        if best in made:
            model.model.layers[made[best].below].mlp.down_proj.weight.data += made[best].change.amounts[0]
        chosen.append(best)
    selection = choose_layers(llama, tokens, settings(exchange=False, protect_first=1))
    assert selection.layers == chosen
    assert chosen[0] in selection.rounds[0]["folded"]
    assert selection.rounds[1]["judged"][chosen[1]]["loss"] == pytest.approx(losses[chosen[1]], rel=1e-6)
    assert untouched(llama, before)
    cut = choose_layers(llama, tokens, settings(judge="cut", exchange=False, protect_first=1))
    assert cut.rounds[0]["judged"] != selection.rounds[0]["judged"]
    assert {one["windows"] for one in cut.rounds[0]["judged"].values()} == {32}
    assert {one["windows"] for one in selection.rounds[0]["judged"].values()} == {16}


def test_a_resumed_choice_goes_on_with_what_stood_for_the_layers_that_went(llama, tokens, tmp_path):
    config, before = settings(judge="fold", protect_first=1), weights(llama)
    want = choose_layers(llama, tokens, config)
    assert want.layers[0] in want.rounds[0]["folded"]
    stop = Stop()
    events = Events(lambda kind, _values: setattr(stop, "code", 143) if kind == "round" else None)
    with pytest.raises(Interrupted):
        choose_layers(llama, tokens, config, session=Session(events, keeper=Keeper(StateStore(tmp_path), stop=stop)))
    assert untouched(llama, before)
    resumed = Session(Events(), keeper=Keeper(StateStore(tmp_path)))
    found = choose_layers(llama, tokens, config, session=resumed)
    assert (found.layers, found.rounds, found.window_forwards) == (want.layers, want.rounds, want.window_forwards)
    assert untouched(llama, before)


def test_where_weights_cannot_change_the_cut_is_judged_and_a_note_says_so(llama, tokens):
    notes = []
    events = Events(lambda kind, values: notes.append(values["text"]) if kind == "note" else None)
    found = choose_layers(llama, tokens, settings(train_weights=True, optimizer="adam"), events)
    assert [text for text in notes if "judged by their cut, not by their fold: all weights are trained" in text]
    assert found.rounds
    notes.clear()
    choose_layers(llama, tokens[:7], settings(), events)
    assert [text for text in notes if "takes 8 windows, one half to fit and one to judge, and there are 7" in text]


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_layers_that_share_keys_and_values_are_chosen_from(family):
    model = build(family)
    tokens = torch.randint(1, 90, (8, 12), generator=torch.Generator().manual_seed(1))
    found = choose_layers(model, tokens, settings())
    assert len(found.layers) == 2
