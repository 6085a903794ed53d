"""Perplexity without each layer against its definition, written out."""

import copy
import math

import pytest
import torch
from torch import nn
from zoo import build

from trsp_fast.config import TRSPConfig
from trsp_fast.run.events import Events
from trsp_fast.select import choose_layers
from trsp_fast.select.sleb import plain_by_window


def choose(model, tokens, count, listener=None, **select):
    settings = TRSPConfig.from_dict({"num_layers": count, "select": {"method": "shortened", **select}})
    return choose_layers(model, tokens, settings, Events(*([listener] if listener else [])))


def perplexity_without(model, tokens, layer):
    """exp of the mean negative log likelihood of every token but each window's first, the layer cut out of a copy."""
    model = copy.deepcopy(model)
    model.model.layers = nn.ModuleList(module for i, module in enumerate(model.model.layers) if i != layer)
    model.config.num_hidden_layers -= 1
    likelihoods = []
    for window in tokens:
        with torch.no_grad():
            logits = model(input_ids=window[None], use_cache=False).logits[0]
        chances = logits.double().softmax(-1)
        likelihoods += [math.log(float(chances[i, window[i + 1]])) for i in range(len(window) - 1)]
    return math.exp(-sum(likelihoods) / len(likelihoods))


def test_it_is_the_definition(llama, tokens):
    expected = {layer: perplexity_without(llama, tokens, layer) for layer in range(6)}
    selection = choose(llama, tokens, 3)
    assert {e["layer"]: e["perplexity"] for e in selection.history} == pytest.approx(expected, rel=1e-4)
    assert selection.layers == sorted(expected, key=expected.get)[:3]


def test_layers_that_do_nothing_go_at_the_dense_perplexity(llama, tokens):
    """The texts are the model's own, so that it misses every layer that does something."""
    heard = []
    for layer in (1, 4):
        llama.model.layers[layer].self_attn.o_proj.weight.data.zero_()
        llama.model.layers[layer].mlp.down_proj.weight.data.zero_()
    texts = llama.generate(tokens[:, :2], max_new_tokens=14, min_new_tokens=14, do_sample=False)
    selection = choose(llama, texts, 2, lambda kind, values: heard.append((kind, values)))
    with torch.no_grad():
        dense = math.exp(float(llama(input_ids=texts, labels=texts).loss))
    perplexities = {entry["layer"]: entry["perplexity"] for entry in selection.history}
    assert [perplexities.pop(1), perplexities.pop(4)] == pytest.approx([dense, dense], rel=1e-5)
    assert dense < 0.9 * min(perplexities.values())
    assert selection.layers == [1, 4]
    assert heard == [("candidate", entry) for entry in selection.history]


def test_the_unchanged_prefix_runs_once(llama, tokens):
    selection = choose(llama, tokens, 2)
    # As in SLEB's first round: three windows of proof; 4 layers walked up, each candidate's own, the last one's below.
    assert selection.window_forwards == math.ceil(3 + 8 * (4 + 5 + 4 + 3 + 2 + 1 + 1) / 6)
    assert selection.window_forwards < 8 * 6 / 1.5


def test_protected_layers_are_not_measured(llama, tokens):
    selection = choose(llama, tokens, 2, protect_first=1, protect_last=2)
    assert {entry["layer"] for entry in selection.history} == {1, 2, 3}
    assert set(selection.layers) < {1, 2, 3}


def test_where_the_prefix_cannot_be_reused_it_says_so():
    model, texts = build("mixtral"), []
    model.config.output_router_logits = True
    tokens = torch.randint(1, 90, (8, 12), generator=torch.Generator().manual_seed(1))
    selection = choose(model, tokens, 2, lambda kind, values: texts.append(values["text"]) if kind == "note" else None)
    losses = plain_by_window(model, tokens, [], list(range(8)))
    assert selection.layers == sorted(losses, key=lambda layer: losses[layer].mean())[:2]
    assert len(texts) == 1
    assert "the loss from the states" in texts[0]


def test_a_loss_beyond_what_exp_can_hold_is_infinite(llama, tokens):
    llama.lm_head.weight = nn.Parameter(llama.lm_head.weight * 1e4)
    selection = choose(llama, tokens, 1)
    assert {entry["perplexity"] for entry in selection.history} == {math.inf}
