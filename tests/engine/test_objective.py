"""The losses without all logits against the model's own: values, gradients, and when each is chosen."""

import copy

import pytest
import torch
from tiny import tiny_llama
from torch import nn
from torch.nn import functional as F
from zoo import ZOO, build

from trsp_fast.engine import head as heads
from trsp_fast.engine import losses
from trsp_fast.engine.head import chunked_cross_entropy, has_chunked_cross_entropy, logits_bytes, output_head
from trsp_fast.engine.losses import (
    CHUNKED,
    CHUNKED_DISTILLATION,
    FULL_DISTILLATION,
    OWN,
    Distillation,
    LossChoice,
    choose_distillation,
    choose_loss,
    disagreement,
)
from trsp_fast.engine.objective import distillation_loss, language_model_loss, mean_loss
from trsp_fast.engine.precision import fp32_weights
from trsp_fast.engine.teacher import UntouchedModel
from trsp_fast.models import families
from trsp_fast.models.families import FAMILIES, Family
from trsp_fast.models.gates import LayerGates
from trsp_fast.run.events import Events

needs_chunked = pytest.mark.skipif(not has_chunked_cross_entropy(), reason="torch has no chunked linear_cross_entropy")

# Tied and untied heads, a head behind a projection (OPT 350m), heads with a bias (phi, gpt-j), experts.
PLAIN = ["llama", "gpt2", "opt", "opt, 350m", "phi", "gpt-j", "mixtral"]
# Their loss is not that of the head alone, and what says so.
OTHER = {
    "gemma2": "final_logit_softcapping = 30",
    "granite": "logits_scaling = 2",
    "cohere": "logit_scale = 0.0625",
    "recurrent-gemma": "not known to have a plain head",
    "gemma3, vision": "composite",
}


def says(own, chunked):
    """A probe that runs both and says what it was made to say."""

    def probe(first, second):
        first()
        second()
        return own, chunked

    return probe


FASTER, SLOWER = says(2.0, 1.0), says(1.0, 2.0)


def never(_own, _chunked):
    raise AssertionError("nothing to measure here")


def gradients(model, loss):
    """Every parameter's gradient of a loss, None where it has none."""
    model.zero_grad()
    loss.backward()
    result = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return result


def largest_share(ours, theirs):
    """The largest difference of two sets of gradients as a share of the gradient, in norm."""
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n] is None] == [n for n in theirs if theirs[n] is None]
    # The bias of keys has no gradient but rounding
    seen = [n for n in ours if ours[n] is not None and not n.endswith(("k_proj.bias", "c_attn.bias"))]
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-6)) for n in seen)


def model_of(name):
    return tiny_llama(tie_word_embeddings=True) if name == "llama, tied" else build(name)


@needs_chunked
@pytest.mark.parametrize("name", ["llama, tied", *PLAIN])
def test_chunked_gives_the_models_own_loss_and_gradients(name, tokens):
    model, tokens = model_of(name), tokens[:4] % 90
    choice = choose_loss(model, tokens, probe=FASTER)
    assert choice.name == CHUNKED
    own, ours = language_model_loss(model, tokens), choice(tokens)
    assert ours.shape == ()
    assert float(ours.detach()) == pytest.approx(float(own.detach()), rel=2e-6)
    assert largest_share(gradients(model, ours), gradients(model, own)) < 1e-4
    assert "forward" not in vars(output_head(model))


@needs_chunked
@pytest.mark.parametrize("name", ["llama, tied", "gpt2", "opt, 350m", "phi"])
def test_in_bf16_chunked_is_as_near_to_fp32_as_the_models_own(name, tokens):
    """fp32 masters under autocast: errors against the fp32 loss of the same states, twice the own error + eps."""
    model, tokens = model_of(name).to(torch.bfloat16), tokens % 90
    with fp32_weights(model) as masters:
        with masters.autocast:
            assert choose_loss(model, tokens, probe=FASTER).name == CHUNKED
            states = heads.hidden_states(model, tokens).detach().requires_grad_()
        head = output_head(model)
        found = {}
        for kind, loss, context in (
            ("exact", heads.plain_cross_entropy, torch.autocast("cpu", enabled=False)),
            ("own", heads.plain_cross_entropy, masters.autocast),
            ("ours", chunked_cross_entropy, masters.autocast),
        ):
            with context:
                value = loss(head, states.float(), tokens)
            found[kind] = [value.detach(), *torch.autograd.grad(value, [states, *head.parameters()])]
        assert found["ours"][0].dtype == torch.float32
        for exact, own, ours in zip(found["exact"], found["own"], found["ours"], strict=True):
            error, allowed = (ours - exact).norm(), 2 * (own - exact).norm()
            assert float(error) <= float(allowed + 2**-8 * exact.norm())
    assert not torch.equal(found["ours"][0], found["ours"][0].to(torch.bfloat16).float())


@needs_chunked
def test_bf16_weights_without_autocast(tokens):
    """As stage 1 has them on a GPU: frozen weights, gradients for the gates only; as near to fp32 as the own loss."""
    model, tokens = tiny_llama().to(torch.bfloat16).requires_grad_(False), tokens[:4]
    assert choose_loss(model, tokens, probe=FASTER).name == CHUNKED

    def found(model, name):
        with LayerGates(model) as gates:
            loss = LossChoice(model, name)(tokens)
            return loss.detach(), *torch.autograd.grad(loss, gates.values)

    exact = found(copy.deepcopy(model).float(), OWN)
    for exactly, own, ours in zip(exact, found(model, OWN), found(model, CHUNKED), strict=True):
        assert float((ours - exactly).norm()) <= float(2 * (own - exactly).norm() + 2**-8 * exactly.norm())


@needs_chunked
@pytest.mark.parametrize("name", ["llama", "opt, 350m"])
def test_layer_gates_see_the_same_pass(name, tokens):
    model, tokens, seen = build(name), tokens % 90, []
    with LayerGates(model) as gates:
        gates.values.data.mul_(torch.linspace(0.4, 1.3, len(gates.stack)))
        gates.bypass([2])
        for loss in (LossChoice(model), LossChoice(model, CHUNKED)):
            gates.values.grad = None
            value = loss(tokens)
            distances = gates.distances("l2")
            (value + 0.1 * torch.stack(list(distances.values())).sum()).backward()
            assert list(distances) == [layer for layer in range(8) if layer != 2]
            seen.append((torch.stack(list(distances.values())).detach(), gates.gradients(), gates.values.grad))
    for own, ours in zip(*seen, strict=True):
        assert float(own.norm()) > 0
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-6)


@needs_chunked
def test_choosing_leaves_no_trace(tokens):
    model, tokens = build("gpt2"), tokens % 90
    assert model.config.resid_pdrop > 0
    model.transformer.h[1].requires_grad_(False)
    model.train()
    flags = [p.requires_grad for p in model.parameters()]
    before = {name: p.clone() for name, p in model.state_dict().items()}
    assert choose_loss(model, tokens, probe=FASTER).name == CHUNKED  # dropout does not count as a difference
    assert model.training
    assert torch.is_grad_enabled()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    head = output_head(model)
    assert not head._forward_pre_hooks
    assert "forward" not in vars(head)


# ---- when it is chosen


@needs_chunked
@pytest.mark.parametrize(("probe", "name"), [(FASTER, CHUNKED), (SLOWER, OWN)])
def test_the_probe_decides_where_memory_does_not(probe, name, llama, tokens):
    events = []
    choice = choose_loss(llama, tokens, events=Events(lambda kind, values: events.append((kind, values))), probe=probe)
    assert choice.name == name
    assert "s a batch for the head" in choice.reason
    assert events == [("loss", {"name": name, "reason": choice.reason})]


@needs_chunked
def test_the_probe_that_measures(llama, tokens):
    choice = choose_loss(llama, tokens)
    assert choice.name in (OWN, CHUNKED)
    assert "s a batch for the head" in choice.reason


def test_the_probe_runs_both_in_turn(monkeypatch):
    calls = []
    both = lambda: calls.append("own"), lambda: calls.append("chunked")
    own, chunked = losses.paired_seconds(*both)
    assert calls == ["own", "chunked"] * 4
    assert own > 0
    assert chunked > 0
    calls.clear()
    monkeypatch.setattr(losses, "PROBE_SECONDS", 0)
    losses.paired_seconds(*both)
    assert calls == ["own", "chunked"] * 2


@needs_chunked
def test_memory_decides_without_a_probe(llama, tokens, monkeypatch):
    needed = logits_bytes(output_head(llama), tokens.numel())
    assert needed == tokens.numel() * 97 * 16
    assert choose_loss(llama, tokens, budget=needed, probe=None).name == OWN
    compared = []
    real = losses.disagreement
    monkeypatch.setattr(losses, "disagreement", lambda m, t, c: compared.append(t.shape) or real(m, t, c))
    assert choose_loss(llama, tokens, budget=needed - 1, probe=never).name == CHUNKED
    assert choose_loss(llama, tokens, budget=needed // 32, probe=never).name == CHUNKED
    assert compared == [(7, 16), (1, 4)]  # never more than the budget holds


@pytest.mark.parametrize("name", list(OTHER))
def test_other_losses_are_the_models_own(name, tokens):
    choice = choose_loss(build(name), tokens % 90, budget=1, probe=never)
    assert choice.name == OWN
    if has_chunked_cross_entropy():
        assert OTHER[name] in choice.reason


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_a_router_loss_is_the_models_own(name, tokens):
    model = build(name)
    model.config.output_router_logits = True
    choice = choose_loss(model, tokens % 90, budget=1, probe=never)
    assert choice.name == OWN
    if has_chunked_cross_entropy():
        assert "output_router_logits = True" in choice.reason


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "recurrent-gemma", "mixtral"])
def test_a_wrong_record_is_caught_on_the_first_batch(name, tokens, monkeypatch):
    model, tokens = build(name), tokens % 90
    if name == "gemma2":
        model.config.final_logit_softcapping = 3.0  # the tiny model's logits are far below 30
    model.config.output_router_logits = name == "mixtral"
    monkeypatch.setattr(families, "_HEAD_SWITCHES", {})
    monkeypatch.setitem(FAMILIES, model.config.model_type, Family(plain_head=True))
    assert "differs" in (disagreement(model, tokens, heads.plain_cross_entropy) or "")
    if has_chunked_cross_entropy():
        choice = choose_loss(model, tokens, budget=1, probe=never)
        assert choice.name == OWN
        assert "on the first batch" in choice.reason
    distil = choose_distillation(model, copy.deepcopy(model), tokens, budget=1)
    assert distil.name == FULL_DISTILLATION
    assert "on the first batch" in distil.reason


def test_a_loss_with_another_gradient_is_caught(llama, tokens):
    """Of the same value: half of the tokens' gradients are cut off."""

    def halved(head, states, tokens):
        cut = torch.cat([states[:, :8].detach(), states[:, 8:]], 1)
        return heads.plain_cross_entropy(head, cut, tokens)

    assert disagreement(llama, tokens, heads.plain_cross_entropy) is None
    assert "its gradient by" in (disagreement(llama, tokens, halved) or "")


@pytest.mark.parametrize("missing", [(F, "linear_cross_entropy"), (nn, "LinearCrossEntropyOptions")])
def test_without_the_function_the_models_own(missing, llama, tokens, monkeypatch):
    monkeypatch.delattr(*missing, raising=False)
    choice = choose_loss(llama, tokens, budget=1, probe=never)
    assert (choice.name, torch.__version__ in choice.reason) == (OWN, True)
    assert torch.equal(choice(tokens), language_model_loss(llama, tokens))


@needs_chunked
def test_heads_that_are_more_than_a_layer(tokens):
    hooked = tiny_llama()
    hooked.lm_head.register_forward_hook(lambda _module, _args, output: 2 * output)
    own = tiny_llama()
    own.lm_head.__class__ = type("Quantised", (nn.Linear,), {})
    replaced = tiny_llama()
    replaced.lm_head.forward = lambda states: F.linear(states, replaced.lm_head.weight)
    for model in (hooked, own, replaced):
        choice = choose_loss(model, tokens, budget=1, probe=never)
        assert (choice.name, choice.reason) == (OWN, "its head is not a bare linear layer")


@needs_chunked
def test_fp16_keeps_its_own(tokens):
    choice = choose_loss(tiny_llama().to(torch.float16), tokens, budget=1, probe=never)
    assert (choice.name, choice.reason) == (OWN, "chunked gradients underflow in fp16")


@needs_chunked
@pytest.mark.slow
@pytest.mark.parametrize("name", list(ZOO))
def test_every_family_with_a_plain_head_has_one(name, tokens):
    """What the records say, on a model of each family; a family without says so."""
    model, tokens = build(name), tokens[:1, :8] % 90
    if families.head_obstacle(model.config.to_dict()) is None:
        assert disagreement(model, tokens, chunked_cross_entropy) is None
    else:
        assert choose_loss(model, tokens, budget=1, probe=never).name == OWN


@needs_chunked
def test_mean_loss_by_a_choice(llama, tokens, monkeypatch):
    wanted = mean_loss(llama, tokens, batch=3)
    monkeypatch.setattr("trsp_fast.engine.objective.language_model_loss", never)
    assert mean_loss(llama, tokens, batch=3, loss=LossChoice(llama, CHUNKED)) == pytest.approx(wanted, rel=2e-6)


# ---- distillation


def targets(teacher, tokens):
    return UntouchedModel(teacher, [], 0).targets(torch.arange(len(tokens)), tokens)


def distillation(student, teacher, *args, **kwargs):
    """Of windows: the distance from a teacher that is asked there and then."""
    choice = Distillation(student, output_head(teacher), *args, **kwargs)
    return lambda tokens: choice(tokens, targets(teacher, tokens))


def perturbed(model):
    """A student that is not its teacher."""
    student = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return student


@pytest.mark.parametrize("name", ["llama, tied", "llama", "opt, 350m", "phi"])
@pytest.mark.parametrize("share", [2, 7])
def test_chunked_distillation_is_distillation(name, share, tokens):
    teacher, tokens = model_of(name).requires_grad_(False), tokens[:3] % 90
    student = perturbed(teacher).requires_grad_(True)
    needed = logits_bytes(output_head(student), tokens.numel(), output_head(teacher))
    assert choose_distillation(student, teacher, tokens, budget=needed).name == FULL_DISTILLATION
    chunked = choose_distillation(student, teacher, tokens, budget=needed // share)
    assert chunked.name == CHUNKED_DISTILLATION

    output = student(input_ids=tokens, labels=tokens, use_cache=False)
    whole = distillation_loss(output.logits, teacher(input_ids=tokens, use_cache=False).logits)
    objective, lm_loss = chunked(tokens, targets(teacher, tokens))
    assert not lm_loss.requires_grad
    assert float(lm_loss) == pytest.approx(float(output.loss.detach()), rel=2e-6)
    assert float(objective.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    assert float(whole.detach()) > 1e-3
    assert largest_share(gradients(student, objective), gradients(student, whole)) < 1e-4


def test_full_distillation_is_as_before(llama, tokens):
    student = perturbed(llama)
    objective, lm_loss = distillation(student, llama)(tokens)
    output = student(input_ids=tokens, labels=tokens, use_cache=False)
    assert torch.equal(objective, distillation_loss(output.logits, llama(input_ids=tokens, use_cache=False).logits))
    assert torch.equal(lm_loss, output.loss.detach())


def test_chunked_distillation_under_autocast(llama, tokens):
    """bf16 multiplies alike on both paths; only sums differ: those of the weights' gradient over chunks, in bf16."""
    student = perturbed(llama)
    with torch.autocast("cpu", torch.bfloat16):
        whole, lm_whole = distillation(student, llama)(tokens)
        chunked, lm_chunked = distillation(student, llama, CHUNKED_DISTILLATION, budget=400_000)(tokens)
    assert float(chunked.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    assert float(lm_chunked) == pytest.approx(float(lm_whole), rel=1e-5)
    assert largest_share(gradients(student, chunked), gradients(student, whole)) < 2**-6


def test_no_chunk_has_more_logits_than_the_budget(llama, tokens, monkeypatch):
    seen = []
    real = heads._distillation_sums
    monkeypatch.setattr(heads, "_distillation_sums", lambda h, *part: seen.append(len(part[0])) or real(h, *part))
    student, head = perturbed(llama), output_head(llama)
    budget = logits_bytes(head, 30, head)
    objective, _ = distillation(student, llama, CHUNKED_DISTILLATION, budget=budget)(tokens)
    assert (sum(seen), max(seen)) == (tokens.numel(), 26)  # 128 in fifths
    objective.backward()
    assert len(seen) == 10  # each once more


def test_distillation_says_why(tokens):
    model, events = build("gemma2"), []
    listener = Events(lambda kind, values: events.append((kind, values["name"])))
    choice = choose_distillation(model, copy.deepcopy(model), tokens % 90, budget=1, events=listener)
    assert OTHER["gemma2"] in choice.reason
    assert events == [("loss", FULL_DISTILLATION)]
