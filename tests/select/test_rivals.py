"""ShortGPT, SLEB and the trivial choices against their definitions, written out."""

import itertools

import pytest
import torch

from trsp_fast import select_layers
from trsp_fast.config import TRSPConfig
from trsp_fast.errors import UserError
from trsp_fast.models.gates import bypassed
from trsp_fast.select import choose_layers
from trsp_fast.select.shortgpt import block_influence


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
    assert selection.window_forwards == 8 * (6 + 5)


def test_trivial_choices(llama, tokens):
    assert select_layers(llama, tokens, "last", ratio=0.5) == [3, 4, 5]
    assert select_layers(llama, tokens, "first", num_layers=2) == [0, 1]
    draws = {tuple(select_layers(llama, tokens, "random", num_layers=2, seed=seed)) for seed in range(12)}
    assert len(draws) > 3
    assert all(len(set(draw)) == 2 for draw in draws)


def test_protection_binds_every_method(llama, tokens):
    for method in ("trsp", "shortgpt", "sleb", "last", "first", "random"):
        values = {"method": method, "protect_first": 2, "protect_last": 2}
        chosen = choose_layers(llama, tokens, TRSPConfig.from_dict({"num_layers": 2, "select": values})).layers
        assert set(chosen) == {2, 3}, method


def test_unknown_method_is_refused(llama, tokens):
    with pytest.raises(UserError, match=r"select.method is 'best'"):
        select_layers(llama, tokens, "best", num_layers=1)
