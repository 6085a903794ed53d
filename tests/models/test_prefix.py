"""PrefixStates: losses and gate gradients with the kept states are those without, on every family of the zoo."""

import pytest
import torch
from zoo import CORE, LAYERS, ZOO, build

from trsp_fast.errors import UserError
from trsp_fast.models import prefix as prefix_module
from trsp_fast.models.gates import LayerGates, bypassed
from trsp_fast.models.prefix import Prefix, PrefixStates
from trsp_fast.run.events import Events

ROWS = torch.tensor([4, 0, 2])
SHARED_KV = {"gemma3n", "gemma4"}  # layer 3 makes the keys and values of layers 5 to 7
# With how many rows a matrix is multiplied changes its rounding on some processors, and experts get few.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def frozen(llama):
    return llama.requires_grad_(False)


def windows():
    return torch.randint(1, 90, (6, 12), generator=torch.Generator().manual_seed(1))


def layer_calls(model, monkeypatch):
    """The layers that really run from now on, one entry a call."""
    calls = []
    for index, layer in enumerate(model.model.layers):
        real = layer.self_attn.forward

        def counted(*args, index=index, real=real, **kwargs):
            calls.append(index)
            return real(*args, **kwargs)

        monkeypatch.setattr(layer.self_attn, "forward", counted)
    return calls


def step(model, gates, tokens):
    gates.values.grad = None
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach(), gates.values.grad.clone()


def notes():
    """Events and the list of notes that they fill."""
    texts = []
    return Events(lambda kind, values: texts.append(values["text"]) if kind == "note" else None), texts


@pytest.mark.parametrize(
    "family",
    [
        name if name in {*CORE, *SHARED_KV} else pytest.param(name, marks=pytest.mark.slow)
        for name in {**ZOO}
        if name != "rwkv"
    ],
)
@pytest.mark.parametrize("first", [3, 7])
def test_losses_and_gate_gradients_are_those_without(family, first):
    try:
        model = build(family).requires_grad_(False)
    except AttributeError as error:
        pytest.skip(f"this transformers has no {error.name or family}")
    events, texts = notes()
    tokens = windows()
    with LayerGates(model, layers=range(first, LAYERS)) as gates:
        gates.values.data.copy_(torch.linspace(0.6, 1.3, LAYERS))
        states = PrefixStates.build(model, tokens, first, events, batch=len(ROWS))
        if family in SHARED_KV and first == 7:
            assert states is None
            assert "layer 3 hands on more than hidden states" in texts[0]
            return
        loss, gradient = step(model, gates, tokens[ROWS])
        with states.rows(ROWS):
            found_loss, found_gradient = step(model, gates, tokens[ROWS])
    allowed = {"rtol": 0, "atol": 0} if family in CORE else CLOSE
    torch.testing.assert_close(found_loss, loss, **allowed)
    torch.testing.assert_close(found_gradient, gradient, **allowed)
    assert texts == []


def test_layers_below_do_not_run(frozen, tokens, monkeypatch):
    calls = layer_calls(frozen, monkeypatch)
    with LayerGates(frozen, layers=[3, 4, 5]) as gates:
        states = PrefixStates.build(frozen, tokens, 3)
        calls.clear()
        with states.rows([1, 2]):
            step(frozen, gates, tokens[1:3])
    assert calls == [3, 4, 5]


def test_bypassed_layers_below_and_above(frozen, tokens, monkeypatch):
    """A round of stage 1: layer 0 protected, 1 and 4 bypassed; the hooks of the bypassed ones are still there."""
    with LayerGates(frozen, layers=[1, 2, 3, 4, 5]) as gates:
        gates.bypass([1, 4])
        gates.values.data.copy_(torch.linspace(0.6, 1.3, 6))
        want = step(frozen, gates, tokens)
        distances = gates.distances("l2")
        states = PrefixStates.build(frozen, tokens, 2)
        calls = layer_calls(frozen, monkeypatch)
        with states.rows(range(8)):
            found = step(frozen, gates, tokens)
            assert gates.distances("l2") == distances
        assert calls == [2, 3, 5]
        assert [torch.equal(*pair) for pair in zip(found, want, strict=True)] == [True, True]
        gates.restore([1])
        assert not torch.equal(step(frozen, gates, tokens)[0], want[0])


def test_the_gates_see_the_kept_states_as_input(frozen, tokens):
    with torch.no_grad():
        entering = frozen(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[3]
    seen = []
    states = PrefixStates.build(frozen, tokens, 3)
    handle = frozen.model.layers[3].register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    with states.rows([5, 0]):
        frozen(input_ids=tokens[[5, 0]], use_cache=False)
    handle.remove()
    assert torch.equal(seen[0], entering[[5, 0]])


def test_a_layer_that_is_computed_again_after_the_context_gets_the_kept_states(frozen, tokens):
    """Gradient checkpointing: with transformers 5.17 the hooks run inside the checkpoint."""
    frozen.train()
    frozen.gradient_checkpointing_enable({"use_reentrant": False})
    with LayerGates(frozen, layers=[2, 3, 4, 5]) as gates:
        gates.values.data.copy_(torch.linspace(0.6, 1.3, 6))
        want = step(frozen, gates, tokens)
        states = PrefixStates.build(frozen, tokens, 2)
        gates.values.grad = None
        with states.rows(range(8)):
            loss = frozen(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        assert torch.equal(gates.values.grad, want[1])


def test_none_where_nothing_is_gained(frozen, tokens):
    events, texts = notes()
    assert PrefixStates.build(frozen, tokens, 0, events) is None
    with bypassed(frozen, [0, 1]):
        assert PrefixStates.build(frozen, tokens, 2, events) is None
        assert PrefixStates.build(frozen, tokens, 3, events) is not None
    assert texts == []


def test_refused_where_a_weight_or_a_gate_below_is_trained(frozen, tokens):
    events, texts = notes()
    with LayerGates(frozen, layers=[1, 3]):
        assert PrefixStates.build(frozen, tokens, 3, events) is None
    frozen.model.layers[2].mlp.up_proj.weight.requires_grad_(True)
    assert PrefixStates.build(frozen, tokens, 3, events) is None
    assert PrefixStates.build(frozen, tokens, 2, events) is not None
    assert ["is trained" in text for text in texts] == [True, True]


@pytest.mark.parametrize("trap", ["a loss of the layers below", "random", "memory"])
def test_refused_with_a_reason(tokens, trap, monkeypatch):
    """Experts' balance enters the loss from every layer; dropout below would have to be drawn anew in every step."""
    events, texts = notes()
    model = build("mixtral" if trap != "random" else "gpt2").requires_grad_(False)
    tokens = windows()
    if trap == "a loss of the layers below":
        model.config.output_router_logits = True
    elif trap == "random":
        model.train()
    else:
        monkeypatch.setattr(prefix_module, "free_memory", lambda: 2 * 6 * 12 * 32 * 4 - 1)
    assert PrefixStates.build(model, tokens, 3, events) is None
    assert len(texts) == 1
    assert ("memory" if trap == "memory" else "the loss from their kept output on is another") in texts[0]


def test_bad_use_is_refused(frozen, tokens):
    states = PrefixStates.build(frozen, tokens, 3)
    with states.rows([0, 1]), torch.no_grad():
        with pytest.raises(UserError, match="exactly the windows"):
            frozen(input_ids=tokens[:3], use_cache=False)
        with pytest.raises(UserError, match="KV cache"):
            frozen(input_ids=tokens[:2], use_cache=True)


def test_no_trace_is_left(frozen, tokens):
    def trace():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), set(m.__dict__)) for m in frozen.modules()]

    expected, before = frozen(input_ids=tokens).logits, trace()
    states = PrefixStates.build(frozen, tokens, 3)
    assert trace() == before
    with pytest.raises(RuntimeError, match="stop"), states.rows([0]):
        raise RuntimeError("stop")
    assert trace() == before
    assert torch.equal(frozen(input_ids=tokens).logits, expected)


def test_states_one_piece_further_up(frozen, tokens):
    """SLEB's walk: the states that enter layer 4 from those that enter layer 2."""
    prefix = Prefix(frozen)
    with torch.no_grad():
        second = prefix.entering(tokens, 2)
        assert torch.equal(prefix.entering(tokens, 4, 2, second), prefix.entering(tokens, 4))
    assert prefix.highest(tokens[:1]) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("budget", [None, 0])
def test_in_device_or_pinned_host_memory(frozen, tokens, budget):
    model, tokens = frozen.cuda(), tokens.cuda()
    with LayerGates(model, layers=[3, 4, 5]) as gates:
        want = step(model, gates, tokens)
        states = PrefixStates.build(model, tokens, 3, budget=budget)
        assert (states.kept.device.type, states.kept.is_pinned()) == (
            ("cuda", False) if budget is None else ("cpu", True)
        )
        with states.rows(torch.arange(8, device="cuda")):
            found = step(model, gates, tokens)
    assert torch.equal(found[0], want[0])
    torch.testing.assert_close(found[1], want[1])
