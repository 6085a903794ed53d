"""Angular distance against its definition, written out."""

import math

import pytest
import torch
from torch import nn
from zoo import build

from trsp_fast.config import TRSPConfig
from trsp_fast.errors import UserError
from trsp_fast.run.events import Events
from trsp_fast.select import choose_layers
from trsp_fast.select.angular import angular_distances, last_token_states


def choose(model, tokens, count, listener=None, **select):
    settings = TRSPConfig.from_dict({"num_layers": count, "select": {"method": "angular", **select}})
    return choose_layers(model, tokens, settings, Events(*([listener] if listener else [])))


def make_identity(*layers):
    for layer in layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_it_is_the_definition(llama, tokens, count):
    """d(x_l, x_l+n) = arccos(x_l . x_l+n / |x_l| |x_l+n|) / pi at the last token, one sequence after the other."""
    expected = [0.0] * (7 - count)
    norm, llama.model.norm = llama.model.norm, nn.Identity()  # transformers gives the last state normalised
    for sequence in tokens:
        with torch.no_grad():
            states = llama(input_ids=sequence[None], output_hidden_states=True).hidden_states
        x = [state[0, -1].double() for state in states]
        for start in range(7 - count):
            a, b = x[start], x[start + count]
            expected[start] += math.acos(float(a @ b) / float(a.norm() * b.norm())) / math.pi / len(tokens)
    llama.model.norm = norm
    selection = choose(llama, tokens, count)
    assert [entry["start"] for entry in selection.history] == list(range(7 - count))
    assert [entry["angular_distance"] for entry in selection.history] == pytest.approx(expected, abs=1e-5)
    first = expected.index(min(expected))
    assert selection.layers == list(range(first, first + count))


def test_right_angles_are_a_half_and_opposites_one():
    """Three layers, two sequences of hidden size 2, by hand."""
    states = torch.tensor([[[1.0, 0], [0, 3]], [[0, 2.0], [0, 1]], [[-1.0, 0], [1, 0]], [[-1.0, 0], [0, -1]]])
    assert angular_distances(states, 1) == pytest.approx([0.25, 0.5, 0.25])
    assert angular_distances(states, 2) == pytest.approx([(1 + 0.5) / 2, (0.5 + 1) / 2])
    assert angular_distances(states, 3) == pytest.approx([1.0])


def test_layers_that_do_nothing_are_at_no_distance(llama, tokens):
    make_identity(llama.model.layers[2], llama.model.layers[3])
    selection = choose(llama, tokens, 2)
    assert selection.layers == [2, 3]
    distances = [entry["angular_distance"] for entry in selection.history]
    assert distances[2] < 1e-7 < min(distances[:2] + distances[3:]) / 1e3


def test_only_the_last_token_counts(llama, tokens):
    """A layer whose attention and MLP are off at the last position is at no distance, whatever it does before."""
    layer = llama.model.layers[4]

    def keep_last(_module, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        return torch.cat([output[:, :-1], x[:, -1:]], 1)

    layer.register_forward_hook(keep_last, with_kwargs=True)
    assert choose(llama, tokens, 1).layers == [4]


def test_each_window_runs_once(llama, tokens):
    windows, heard = [], []
    llama.model.register_forward_pre_hook(
        lambda _module, args, kwargs: windows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    selection = choose(llama.train(), tokens.repeat(3, 1), 2, lambda kind, values: heard.append((kind, values)))
    assert windows == [16, 8]
    assert selection.window_forwards == 24
    assert heard == [("candidate", entry) for entry in selection.history]
    assert llama.training
    assert not any(layer._forward_hooks for layer in llama.model.layers)


def test_protected_layers_stay(llama, tokens):
    make_identity(llama.model.layers[2], llama.model.layers[3])
    selection = choose(llama, tokens, 2, protect_first=3, protect_last=1)
    assert selection.layers == [3, 4]
    assert len(selection.history) == 5


def test_layers_that_may_go_but_not_in_a_row_are_refused():
    """Gemma 3n's layers 3 and 4 make the keys and values of others; those below and above are three each."""
    model = build("gemma3n")
    tokens = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(1))
    assert choose(model, tokens, 3).layers in ([0, 1, 2], [5, 6, 7])
    assert last_token_states(model, tokens).shape == (9, 3, 2 * 32)
    with pytest.raises(UserError, match=r"takes 4 layers in a row, and no 4 of the layers that may go are in a row"):
        choose(model, tokens, 4)
