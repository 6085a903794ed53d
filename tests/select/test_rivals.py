"""ShortGPT, SLEB and the trivial choices against their definitions, written out."""

import itertools
import math

import pytest
import torch
from zoo import build

from trsp_fast import select_layers
from trsp_fast.config import TRSPConfig
from trsp_fast.engine.objective import losses_by_window, mean_loss
from trsp_fast.errors import UserError
from trsp_fast.models.gates import LayerGates, bypassed
from trsp_fast.run.events import Events
from trsp_fast.select import choose_layers
from trsp_fast.select.shortgpt import block_influence
from trsp_fast.select.sleb import judge_layers, plain_by_window


def test_block_influence_is_one_minus_the_mean_cosine(llama, tokens):
    with torch.no_grad():
        states = llama(input_ids=tokens, output_hidden_states=True).hidden_states
    # transformers normalises the last one, so the last layer is left out here
    expected = [
        1 - float(torch.cosine_similarity(a.double(), b.double(), dim=-1).mean())
        for a, b in itertools.pairwise(states[:-1])
    ]
    assert block_influence(llama, tokens)[:-1] == pytest.approx(expected, rel=1e-4)


def test_shortgpt_takes_the_smallest(llama, tokens):
    influence = block_influence(llama, tokens)
    expected = sorted(sorted(range(6), key=lambda i: influence[i])[:2])
    assert select_layers(llama, tokens, "shortgpt", num_layers=2) == expected


def test_sleb_is_greedy_on_the_loss(llama, tokens):
    chosen = []
    for _ in range(2):
        losses = {}
        for layer in set(range(6)) - set(chosen):
            with bypassed(llama, [*chosen, layer]), torch.no_grad():
                losses[layer] = float(llama(input_ids=tokens, labels=tokens, use_cache=False).loss)
        chosen.append(min(losses, key=losses.get))
    selection = choose_layers(llama, tokens, TRSPConfig.from_dict({"num_layers": 2, "select": {"method": "sleb"}}))
    assert selection.layers == chosen
    # Per round with n alive: three windows of proof; n - 2 layers walked up, each candidate's own layers, and the last
    # one's below it; as shares of n.
    shares = [sum((n - 2, *range(n - 1, 0, -1), 1)) / n for n in (6, 5)]
    assert selection.window_forwards == math.ceil(sum(3 + 8 * share for share in shares))
    assert selection.window_forwards < 8 * (6 + 5)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3, 4, 5], [4, 1, 3], [2, 5], [3]])
def test_losses_without_a_layer_are_those_of_whole_passes(llama, tokens, layers):
    """Bit for bit, with layers that are bypassed already by the gates or by `gone`, and with a smaller last batch."""
    tokens = (tokens.repeat(3, 1)[:19] + torch.arange(19)[:, None]) % 97
    with LayerGates(llama) as gates, gates.neutral():
        gates.bypass([0] if 0 not in layers else [])
        gone = [] if 2 in layers else [2]
        judged = judge_layers(llama, tokens, gone, layers)
        whole = plain_by_window(llama, tokens, gone, layers)
        assert list(judged.by_window) == layers
        assert all(torch.equal(judged.by_window[layer], whole[layer]) for layer in layers)
        for layer in layers:
            with bypassed(llama, [*gone, layer]):
                assert judged.losses[layer] == pytest.approx(mean_loss(llama, tokens), rel=1e-6)


def test_a_windows_loss_is_the_models_own(llama, tokens):
    """And what the model adds to a batch's loss, the balance of its experts, is shared by all of its windows."""
    with torch.no_grad():
        alone = [float(llama(input_ids=window[None], labels=window[None]).loss) for window in tokens]
    assert losses_by_window(llama, tokens).tolist() == pytest.approx(alone, rel=1e-5)
    model = build("mixtral")
    tokens = tokens % 90
    plain = losses_by_window(model, tokens)
    model.config.output_router_logits = True
    output = model(input_ids=tokens, labels=tokens)
    balance = float(model.router_aux_loss_coef * output.aux_loss.detach())
    assert balance > 1e-3
    assert (losses_by_window(model, tokens) - plain).tolist() == pytest.approx([balance] * 8, rel=1e-4)


def test_sleb_runs_the_unchanged_prefix_once(llama, tokens, monkeypatch):
    calls = []
    for index, layer in enumerate(llama.model.layers):
        real = layer.mlp.forward
        monkeypatch.setattr(layer.mlp, "forward", lambda x, i=index, f=real: (calls.append((i, len(x))), f(x))[1])
    judged = judge_layers(llama, tokens, [], list(range(6)))
    reused = sum(size for _, size in calls)
    assert reused / 6 <= judged.cost <= reused / 6 + 0.5  # in the proof a candidate is bypassed, which counts as run
    calls.clear()
    plain_by_window(llama, tokens, [], list(range(6)))
    assert sum(size for _, size in calls) == 8 * 6 * 5
    # The walk takes 4 layers, and the candidates 5 + 4 + 3 + 2 + 1 and, for the last, 1.
    assert reused <= 8 * (4 + 15 + 1) + 3 * 6


def test_where_the_prefix_cannot_be_reused_sleb_says_so():
    """The balance of Mixtral's experts enters the loss from every layer: whole passes, the same choice, a note."""
    model, texts = build("mixtral"), []
    model.config.output_router_logits = True
    tokens = torch.randint(1, 90, (8, 12), generator=torch.Generator().manual_seed(1))
    events = Events(lambda kind, values: texts.append(values["text"]) if kind == "note" else None)
    settings = TRSPConfig.from_dict({"num_layers": 2, "select": {"method": "sleb"}})
    selection = choose_layers(model, tokens, settings, events)
    whole = plain_by_window(model, tokens, [], list(range(8)))
    assert selection.history[0]["losses"] == {layer: float(losses.mean()) for layer, losses in whole.items()}
    with bypassed(model, [3]):
        assert selection.history[0]["losses"][3] == pytest.approx(mean_loss(model, tokens), rel=1e-6)
    assert selection.window_forwards == 2 * 3 + 8 * (8 + 7)
    assert len(texts) == 1
    assert "the loss from the states" in texts[0]


def test_shared_keys_and_values_keep_the_states_below_their_layer():
    """Gemma 3n: layer 3 makes the keys and values of layers 5 to 7, so no pass can begin above it."""
    model = build("gemma3n")
    tokens = torch.randint(1, 90, (8, 12), generator=torch.Generator().manual_seed(1))
    layers = [0, 1, 2, 5, 6, 7]
    judged = judge_layers(model, tokens, [], layers)
    assert judged.obstacle == "layer 3 hands on more than hidden states"
    whole = plain_by_window(model, tokens, [], layers)
    assert all(torch.equal(judged.by_window[layer], whole[layer]) for layer in layers)
    assert judged.cost < 8 * len(layers)


def test_trivial_choices(llama, tokens):
    assert select_layers(llama, tokens, "last", ratio=0.5) == [3, 4, 5]
    assert select_layers(llama, tokens, "first", num_layers=2) == [0, 1]
    draws = {tuple(select_layers(llama, tokens, "random", num_layers=2, seed=seed)) for seed in range(12)}
    assert len(draws) > 3
    assert all(len(set(draw)) == 2 for draw in draws)


def test_protection_binds_every_method(llama, tokens):
    for method in ("trsp", "shortgpt", "sleb", "angular", "shortened", "last", "first", "random"):
        values = {"method": method, "protect_first": 2, "protect_last": 2}
        chosen = choose_layers(llama, tokens, TRSPConfig.from_dict({"num_layers": 2, "select": values})).layers
        assert set(chosen) == {2, 3}, method


@pytest.mark.parametrize("method", ["trsp", "sleb", "shortgpt", "angular", "shortened"])
def test_the_choice_may_be_made_on_the_first_windows(llama, tokens, method):
    def chosen(windows, **select):
        values = {"num_layers": 2, "select": {"method": method, **select}}
        return choose_layers(llama, windows, TRSPConfig.from_dict(values))

    few, all_of_them = chosen(tokens[:3]), chosen(tokens)
    assert chosen(tokens, samples=3) == few
    assert few != all_of_them  # what was measured, if not the layers
    assert chosen(tokens, samples=10**6) == all_of_them


def test_unknown_method_is_refused(llama, tokens):
    with pytest.raises(UserError, match=r"select.method is 'best'"):
        select_layers(llama, tokens, "best", num_layers=1)
