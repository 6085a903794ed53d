"""transfer.gap_lr: rates by distance to a gap, against torch's AdamW with a rate for each layer."""

import copy

import pytest
import torch

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.optimizers import load_optimizer_state, make_optimizer, optimizer_state, set_rate
from trsp_fast.models.gates import bypassed
from trsp_fast.transfer import rate_factors, transfer


def layer_of(name):
    return int(name.split(".")[2]) if ".layers." in name else None


def test_layers_next_to_a_gap_learn_at_a_higher_rate(llama, tokens):
    """The first step against torch's AdamW with a rate for each layer; layers 0 to 5, 1 is cut."""
    twin, rates = copy.deepcopy(llama), {None: 1e-3, 0: 3e-3, 2: 3e-3, 3: 1e-3, 4: 1e-3 / 3, 5: 1e-3 / 3}
    before, tokens = copy.deepcopy(llama.state_dict()), tokens[:4]
    plain = {"objective": "lm", "hidden": 0.0, "noise": 0.0, "fold": "none"}
    steps = {"epochs": 1, "lr": 1e-3, "gap_lr": 3.0, "warmup": 0.0, "clip": 0.0}
    values = {"num_layers": 1, "data": {"batch": 4}, "transfer": {**plain, **steps}}
    history = transfer(llama, tokens, [1], TRSPConfig.from_dict(values))
    assert history[0]["lr"] == 1e-3
    with bypassed(twin, [1]):
        twin(input_ids=tokens, labels=tokens).loss.backward()
    named = {name: parameter for name, parameter in twin.named_parameters() if layer_of(name) != 1}
    groups = [{"params": [parameter], "lr": rates[layer_of(name)]} for name, parameter in named.items()]
    torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0).step()
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(parameter, dict(twin.named_parameters())[name], rtol=0, atol=1e-6)
        assert torch.equal(parameter, before[name]) == (layer_of(name) == 1)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_a_resumed_optimiser_keeps_the_rates_of_its_layers(llama, tokens, kind):
    if kind == "adamw8bit":
        pytest.importorskip("torchao.optim")
    named, factors = dict(llama.named_parameters()), rate_factors(llama, dict(llama.named_parameters()), [2], 2.0)
    assert {layer_of(name): factor for name, factor in factors.items()} == {
        None: 1, 0: 1, 1: 2, 2: 1, 3: 2, 4: 1, 5: 0.5
    }  # fmt: skip
    named = dict(sorted(named.items(), key=lambda item: layer_of(item[0]) != 1))
    optimizer, other = (make_optimizer(kind, named, 1e-3, (0.9, 0.95), factors) for _ in range(2))
    assert sorted(float(group["lr"]) for group in other.param_groups) == pytest.approx([5e-4, 1e-3, 2e-3])
    llama(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    load_optimizer_state(other, named, optimizer_state(optimizer, named))
    set_rate(optimizer, 4e-3)
    assert sorted(float(group["lr"]) for group in optimizer.param_groups) == pytest.approx([2e-3, 4e-3, 8e-3])
    assert [float(group["lr"]) / group["factor"] for group in other.param_groups] == pytest.approx([1e-3] * 3)


def test_a_weight_of_several_layers_has_the_rate_of_the_nearest(llama):
    llama.model.layers[5].mlp = llama.model.layers[2].mlp
    factors = rate_factors(llama, dict(llama.named_parameters()), [1], 2.0)
    assert {factors[name] for name in factors if name.startswith("model.layers.2.mlp")} == {2.0}
    assert {factors[name] for name in factors if name.startswith("model.layers.5.")} == {0.5}
    assert set(rate_factors(llama, dict(llama.named_parameters()), [], 2.0).values()) == {1.0}
    factors = rate_factors(llama, dict(llama.named_parameters()), [0, 4], 2.0)  # the nearest gap counts
    assert {layer_of(name): factor for name, factor in factors.items()} == {None: 1, 0: 1, 1: 2, 2: 1, 3: 2, 4: 1, 5: 2}
    llama.model.layers[4].mlp = llama.model.layers[3].mlp  # one that goes has no say
    factors = rate_factors(llama, dict(llama.named_parameters()), [3], 2.0)
    assert {factors[name] for name in factors if name.startswith("model.layers.3.mlp")} == {2.0}
    assert {factors[name] for name in factors if name.startswith("model.layers.3.self_attn")} == {1.0}
