"""LayerGates against a hand-written loop: values, gradients, norms, checkpointing, bypass, and no trace."""

import pytest
import torch
from torch import nn

from trsp_fast.errors import UserError
from trsp_fast.models.gates import LayerGates, bypassed, distance

VALUES = torch.tensor([0.9, 1.0, 0.4, 0.05, 1.3, 0.7])


def loss_of(model, tokens, mask=None):
    return model(input_ids=tokens, labels=tokens, attention_mask=mask, use_cache=False).loss


class Written(nn.Module):
    """What a gate does to one layer, written out; remembers the difference between input and output."""

    def __init__(self, layer, gate, mode):
        super().__init__()
        self.layer, self.gate, self.mode = layer, gate, mode

    def forward(self, x, *args, **kwargs):
        out = self.layer(x, *args, **kwargs)
        self.difference = out - x
        return self.gate * out if self.mode == "output" else self.gate * out + (1 - self.gate) * x


def by_hand(model, mode, tokens, mask=None):
    """Loss, gate gradients, weight gradient and summed l2 norms per sequence by the written-out gates."""
    gates = VALUES.clone().requires_grad_()
    layers = [Written(layer, gates[i], mode) for i, layer in enumerate(model.model.layers)]
    original, model.model.layers = model.model.layers, nn.ModuleList(layers)
    loss = loss_of(model, tokens, mask)
    kept = torch.ones_like(tokens) if mask is None else mask
    norms = torch.stack([(w.difference.square().sum(-1) * kept).sum(1) for w in layers])
    elements = kept.sum(1) * 32
    penalty = (norms / elements).sqrt().mean(1).sum()
    (loss + 0.1 * penalty).backward()
    model.model.layers = original
    weight = model.model.layers[2].mlp.up_proj.weight
    result = loss.detach(), gates.grad, weight.grad.clone(), norms.detach()
    model.zero_grad()
    return result


def by_gates(model, mode, tokens, mask=None, detach=False):
    with LayerGates(model, mode=mode, detach_norms=detach) as gates:
        gates.values.data.copy_(VALUES)
        loss = loss_of(model, tokens, mask)
        penalty = torch.stack(list(gates.distances("l2").values())).sum()
        norms = torch.stack([l2.detach() for _, l2 in gates.norms().values()])
        (loss + 0.1 * penalty).backward()
        rows = gates.gradients()
    weight = model.model.layers[2].mlp.up_proj.weight
    result = loss.detach(), gates.values.grad, weight.grad.clone(), norms
    model.zero_grad()
    return result, rows


@pytest.mark.parametrize("mode", ["residual", "output"])
@pytest.mark.parametrize("padded", [False, True])
def test_loss_gradients_and_norms_equal_the_written_out_loop(llama, tokens, mode, padded):
    mask = torch.ones_like(tokens)
    if padded:
        mask[:3, :5] = 0
    expected = by_hand(llama, mode, tokens, mask)
    found, rows = by_gates(llama, mode, tokens, mask)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(rows.sum(0), found[1])
    assert rows.shape == (8, 6)


def test_rows_are_each_sequences_own_gradient(llama, tokens):
    _, rows = by_gates(llama, "residual", tokens)
    with LayerGates(llama, mode="residual", norms=False) as gates:
        gates.values.data.copy_(VALUES)
        loss_of(llama, tokens).backward()
        rows = gates.gradients() * len(tokens)
    for index in (0, 5):
        with LayerGates(llama, mode="residual", norms=False) as gates:
            gates.values.data.copy_(VALUES)
            loss_of(llama, tokens[index : index + 1]).backward()
            torch.testing.assert_close(gates.values.grad, rows[index], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["residual", "output"])
@pytest.mark.parametrize("detach", [False, True])
def test_checkpointing_changes_neither_loss_nor_gradients(llama, tokens, mode, detach):
    llama.train()
    plain, plain_rows = by_gates(llama, mode, tokens, detach=detach)
    llama.gradient_checkpointing_enable({"use_reentrant": False})
    kept, kept_rows = by_gates(llama, mode, tokens, detach=detach)
    for one, other in zip(kept, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(kept_rows, plain_rows, rtol=0, atol=0)


def test_a_recomputed_layer_does_not_replace_the_norms_of_the_forward_pass(llama, tokens):
    """What a checkpoint with the hooks inside does in the backward pass: call one layer again."""
    with LayerGates(llama) as gates:
        loss_of(llama, tokens)
        first = gates.norms()[2]
        x = torch.randn(8, 16, 32)
        llama.model.layers[2](x, position_embeddings=llama.model.rotary_emb(x, torch.arange(16)[None]))
        assert all(one is other for one, other in zip(gates.norms()[2], first, strict=True))


def test_reentrant_checkpointing_is_refused(llama, tokens):
    llama.train()
    llama.gradient_checkpointing_enable({"use_reentrant": True})
    with LayerGates(llama), pytest.raises(UserError, match="re-entrant"):
        loss_of(llama, tokens)


@pytest.mark.parametrize("mode", ["residual", "output", None])
def test_gates_of_one_change_nothing(llama, tokens, mode):
    expected = llama(input_ids=tokens).logits
    with LayerGates(llama, mode=mode):
        assert torch.equal(llama(input_ids=tokens).logits, expected)


def test_residual_gate_of_zero_is_the_bypass(llama, tokens):
    with LayerGates(llama, mode="residual") as gates, torch.no_grad():
        gates.values[2] = 0
        gated = llama(input_ids=tokens, use_cache=False).logits
    with LayerGates(llama, mode="residual") as gates, torch.no_grad():
        gates.bypass([2])
        assert torch.equal(llama(input_ids=tokens, use_cache=False).logits, gated)
        assert 2 not in gates.norms()
        gates.restore([2])
        assert not torch.equal(llama(input_ids=tokens, use_cache=False).logits, gated)


def test_detached_norms_reach_only_the_layer_itself(llama, tokens):
    with LayerGates(llama, mode=None, layers=[3], detach_norms=True) as gates:
        loss_of(llama, tokens)
        gates.distances("l2")[3].backward()
    touched = {name.split(".")[2] for name, p in llama.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"3"}


def test_attached_norms_reach_the_layers_below(llama, tokens):
    with LayerGates(llama, mode=None, layers=[3]) as gates:
        loss_of(llama, tokens)
        gates.distances("l2")[3].backward()
    assert llama.model.layers[0].mlp.up_proj.weight.grad.any()
    assert llama.model.layers[4].mlp.up_proj.weight.grad is None


def test_no_trace_is_left(llama, tokens):
    expected = llama(input_ids=tokens).logits
    names = [name for name, _ in llama.named_modules()]
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks), set(m.__dict__)) for m in llama.modules()]
    with LayerGates(llama) as gates:
        gates.bypass([0, 4])
    gates = LayerGates(llama).__enter__()
    gates.bypass([2])
    gates.__exit__(RuntimeError, RuntimeError("stop"), None)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks), set(m.__dict__)) for m in llama.modules()] == before
    assert [name for name, _ in llama.named_modules()] == names
    assert torch.equal(llama(input_ids=tokens).logits, expected)


def test_bypass_keeps_a_forward_that_was_already_replaced(llama):
    def mine(*_args, **_kwargs):
        raise AssertionError("not called")

    llama.model.layers[1].forward = mine
    with bypassed(llama, [1]):
        assert llama.model.layers[1].forward is not mine
    assert llama.model.layers[1].forward is mine


def test_bypassing_the_layer_that_tells_the_cache_length_refuses_a_cache(llama, tokens):
    with bypassed(llama, [0]), torch.no_grad():
        llama(input_ids=tokens, use_cache=False)
        with pytest.raises(UserError, match="KV cache"):
            llama(input_ids=tokens, use_cache=True)


def test_generation_with_a_cache_and_a_bypassed_later_layer_is_right(llama, tokens):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(tokens)}
    with bypassed(llama, [2, 5]):
        cached, uncached = (llama.generate(tokens, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)


def test_one_unbind_serves_all_layers(llama, tokens):
    """The gates' gradient arrives through one node, not through one scatter per layer."""
    with LayerGates(llama, mode="residual") as gates:
        loss = loss_of(llama, tokens)
        seen, todo = set(), [loss.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [parent for parent, _ in node.next_functions]
        assert sum("Unbind" in type(node).__name__ for node in seen) == 1
        assert gates.values.shape == (6,)
        assert gates.values.dtype == torch.float32


@pytest.mark.parametrize(("norm", "expected"), [("l1", 0.5), ("l2", 0.75), ("frobenius", 3.0)])
def test_distances_by_hand(norm, expected):
    """Two sequences of 16 kept elements: sums of |d| 4 and 12, of d*d 9 and 9 (and an empty one of 0)."""
    l1, l2 = torch.tensor([4.0, 12.0]), torch.tensor([9.0, 9.0])
    torch.testing.assert_close(distance(l1, l2, 16, norm), torch.tensor(expected))


def test_the_roots_gradient_is_zero_at_zero():
    l2 = torch.tensor([0.0, 4.0], requires_grad=True)
    distance(torch.zeros(2), l2, 1, "l2").backward()
    assert l2.grad.tolist() == [0.0, 0.125]


def test_bad_arguments_are_refused(llama):
    with pytest.raises(UserError, match="layers are"):
        LayerGates(llama, layers=[6])
    with pytest.raises(UserError, match="mode is"):
        LayerGates(llama, mode="both")


def test_a_bypass_that_fails_half_way_leaves_no_layer_without_its_forward(llama, monkeypatch):
    """To learn what a layer returns may take a forward pass, and that may fail where layers need each other."""
    from trsp_fast.models import bypass

    real = bypass._returned

    def returned(model, layer):
        if layer is model.model.layers[2]:
            raise KeyError("sliding_attention")
        return real(model, layer)

    monkeypatch.setattr(bypass, "_returned", returned)
    with pytest.raises(KeyError), bypassed(llama, [0, 1, 2]):
        pass
    assert not any("forward" in layer.__dict__ for layer in llama.model.layers)
