"""Layer collapse: merges computed by hand, and the paper's algorithm written out."""

import copy
import math

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from zoo import build

from trsp_fast.errors import UserError
from trsp_fast.laco import merge
from trsp_fast.run.events import Events


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def layers_merged(layers, layer, merged):
    """The layers with theta_l + sum_k (theta_l+k - theta_l) in layer l and without l+1 to l+m."""
    base = layers[layer].state_dict()
    total = {name: value.clone() for name, value in base.items()}
    for k in range(1, merged + 1):
        for name, value in layers[layer + k].state_dict().items():
            total[name] += value - base[name]
    new = copy.deepcopy(layers[layer])
    new.load_state_dict(total)
    return [*layers[:layer], new, *layers[layer + merged + 1 :]]


class Paper:
    """Algorithm 1, layers counted from 0, on lists of a model's layers."""

    def __init__(self, model, tokens):
        self.model, self.tokens, self.layers = copy.deepcopy(model), tokens, list(model.model.layers)
        self.states = self.last_states(self.layers)

    def last_states(self, layers):
        self.model.model.layers = nn.ModuleList(layers)
        with torch.no_grad():
            return [self.model.model(input_ids=t[None], use_cache=False)[0].double().flatten() for t in self.tokens]

    def similarity(self, layers):
        """Mean over sentences of the cosine of their last hidden states, each sentence's as one vector."""
        cosines = [a @ b / a.norm() / b.norm() for a, b in zip(self.last_states(layers), self.states, strict=True)]
        return float(sum(cosines)) / len(cosines)

    def walk(self, c, low, high, interval, threshold, end):
        """What is left of the layers, ended at `end` of them."""
        layers, at = self.layers, high - c
        while at >= low and len(layers) > end:
            k = min(c - 1, len(layers) - at - 1, len(layers) - end)
            trial = layers_merged(layers, at, k)
            if self.similarity(trial) > threshold:
                layers = trial
                at -= interval
                if at > len(layers) - c:
                    at = len(layers) - c
            else:
                at -= 1
        return layers


CASES = [
    # count, at_once, lowest, highest, interval
    pytest.param(1, 2, 1, 8, 1, id="one pair"),
    pytest.param(3, 2, 0, 8, 1, id="pairs"),
    pytest.param(4, 3, 1, 8, 2, id="threes"),
    pytest.param(4, 4, 1, 8, 2, id="a last merge of one"),
    pytest.param(2, 2, 1, 6, 3, id="from below the top, far apart"),
    pytest.param(6, 4, 1, 8, 2, id="all that can go"),
]


@pytest.mark.parametrize(("count", "at_once", "lowest", "highest", "interval"), CASES)
def test_it_is_the_papers_walk_at_the_highest_threshold_that_takes_so_many(count, at_once, lowest, highest, interval):
    model, end = tiny_llama(8), 8 - count
    tokens = torch.randint(0, 97, (3, 8), generator=torch.Generator().manual_seed(1))
    options = {"at_once": at_once, "lowest": lowest, "highest": highest, "interval": interval}
    small, collapse = merge(model, count, tokens, **options)
    paper, sizes = Paper(model, tokens), (at_once, lowest, highest, interval)
    # Half a millionth lower: the similarities are computed in another order here.
    expected = paper.walk(*sizes, collapse.threshold - 5e-7, end)
    assert len(expected) == len(small.model.layers) == small.config.num_hidden_layers == end
    for own, theirs in zip(small.model.layers, expected, strict=True):
        for name, value in own.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert collapse.similarity == pytest.approx(paper.similarity(expected), abs=1e-6)
    for higher in torch.linspace(collapse.threshold + 1e-6, 1, 4).tolist():
        assert len(paper.walk(*sizes, higher, end)) > end


def test_one_merge_by_hand(llama, tokens):
    """With every similarity good enough the first merge is layers 3, 4 and 5: theta_4 + theta_5 - theta_3."""
    small, collapse = merge(llama, 2, tokens, at_once=3, threshold=-1.5)
    one, two, three = (dict(layer.named_parameters()) for layer in llama.model.layers[3:])
    for name, value in small.model.layers[3].named_parameters():
        torch.testing.assert_close(value, two[name] + three[name] - one[name])
    assert collapse.groups == [[0], [1], [2], [3, 4, 5]]
    assert collapse.history == [{"layer": 3, "merged": 2, "similarity": collapse.similarity, "kept": True}]
    assert collapse.threshold == -1.5
    assert collapse.window_forwards == 8 + 6  # the whole model, then four of its six layers


def test_layers_that_merge_without_loss_are_found(llama, tokens):
    """Layers 2 and 3 are the same and do nothing, so that 2 + (3 - 2) + (4 - 2) is layer 4."""
    layers = llama.model.layers
    layers[2].self_attn.o_proj.weight.data.zero_()
    layers[2].mlp.down_proj.weight.data.zero_()
    layers[3].load_state_dict(layers[2].state_dict())
    small, collapse = merge(llama, 2, tokens, at_once=3)
    assert collapse.groups == [[0], [1], [2, 3, 4], [5]]
    assert collapse.similarity == pytest.approx(1, abs=1e-9)
    assert [entry["kept"] for entry in collapse.history] == [False, True]
    torch.testing.assert_close(logits(small, tokens), logits(llama, tokens), rtol=1e-4, atol=1e-4)


def test_a_merged_layer_takes_part_in_the_next_merge(llama, tokens):
    """From the top with pairs: 4 + (5 - 4), then that into 3, and so on; what is left of pairs is the upper one."""
    small, collapse = merge(llama, 3, tokens, at_once=2, interval=1, threshold=-1.5)
    assert collapse.groups == [[0], [1], [2, 3, 4, 5]]
    for name, value in small.model.layers[2].named_parameters():
        torch.testing.assert_close(value, dict(llama.model.layers[5].named_parameters())[name])


@pytest.mark.parametrize(
    ("interval", "merges"),
    [
        pytest.param(1, [(5, 2), (3, 2)], id="as high as three layers fit"),
        pytest.param(4, [(5, 2), (1, 2)], id="as far below as asked"),
    ],
)
def test_where_the_next_merge_is_tried(tokens, interval, merges):
    _, collapse = merge(tiny_llama(8), 4, tokens, at_once=3, interval=interval, threshold=-1.5)
    assert [(entry["layer"], entry["merged"]) for entry in collapse.history] == merges


def test_a_model_in_training_is_compared_without_dropout(tokens):
    model = tiny_llama(attention_dropout=0.5)
    _, expected = merge(model, 1, tokens)
    small, collapse = merge(model.train(), 1, tokens)
    assert collapse == expected
    assert model.training
    assert small.training


def test_the_source_stays_as_it_is_and_the_result_is_an_ordinary_model(llama, tokens, tmp_path):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    llama.model.layers[0].requires_grad_(False)
    small, collapse = merge(llama, 2, tokens, at_once=3, threshold=-1.5, lowest=2)
    assert llama.config.num_hidden_layers == len(llama.model.layers) == 6
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert small.model.layers[0].mlp.up_proj.weight is llama.model.layers[0].mlp.up_proj.weight
    assert small.lm_head.weight is small.model.embed_tokens.weight
    merged = small.model.layers[collapse.history[-1]["layer"]]
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in merged.parameters())
    small.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(small, tokens))
    assert small.generate(tokens[:1], max_new_tokens=3, do_sample=False).shape == (1, 19)


def test_half_precision_is_summed_in_fp32(llama, tokens):
    llama.to(torch.bfloat16)
    small, _ = merge(llama, 2, tokens, at_once=3, threshold=-1.5)
    one, two, three = (layer.mlp.up_proj.weight.double() for layer in llama.model.layers[3:])
    value = small.model.layers[3].mlp.up_proj.weight
    assert torch.equal(value, (two + three - one).to(torch.bfloat16))


def test_nothing_is_measured_twice(llama, tokens, monkeypatch):
    """Walks with a lower threshold begin as those before."""
    heard, layers_run, real = [], [], LlamaDecoderLayer.forward

    def counted(layer, hidden_states, *args, **kwargs):
        layers_run.append(len(hidden_states))
        return real(layer, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    events = Events(lambda kind, values: heard.append((kind, values)))
    _, collapse = merge(llama, 3, tokens, at_once=2, interval=1, events=events)
    assert {kind for kind, _ in heard} == {"candidate"}
    measured = {(values["layer"], values["merged"], values["similarity"]) for _, values in heard}
    assert len(measured) == len(heard) > len(collapse.history)
    assert {(e["layer"], e["merged"], e["similarity"]) for e in collapse.history} <= measured
    assert collapse.window_forwards == math.ceil(sum(layers_run) / 6)
    # The untouched model, then each candidate with between five and three of its layers.
    assert 8 * (6 + 3 * len(heard)) < sum(layers_run) < 8 * (6 + 5 * len(heard))


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "num_layers 0 of 6 layers comes to none"),
        (6, {}, "num_layers 6 of 6 layers comes to all or more"),
        (1, {"at_once": 1}, "at_once is 1 and interval 2; give at least 2 and at least 1"),
        (1, {"interval": 0}, "at_once is 4 and interval 0"),
        (1, {"lowest": 3}, "lowest is 3 and highest 6; 4 of 6 layers at once need 0 <= lowest <= highest - 4"),
        (1, {"highest": 7}, "lowest is 1 and highest 7"),
        (5, {}, "merging 4 at once from layer 5 down to 1 takes out 3 with the lowest threshold, 5 with none"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(llama, tokens, count, options, message):
    with pytest.raises(UserError, match=message):
        merge(llama.train(), count, tokens, **options)
    assert llama.training


def test_layers_of_different_shapes_are_refused():
    model, tokens = build("lfm2"), torch.randint(1, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    with pytest.raises(UserError, match=r"layers 1 and 2 cannot be merged: \S+ is .* in one and .* in the other"):
        merge(model, 2, tokens)
    model = build("deepseek-v3")  # dense below layer 3, experts from there on
    with pytest.raises(UserError, match="layers 2 and 3 cannot be merged"):
        merge(model, 2, tokens, lowest=2)
    small, collapse = merge(model, 2, tokens, lowest=3)
    assert len(collapse.groups) == small.config.num_hidden_layers == 6
