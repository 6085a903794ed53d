"""Stage 1: the mechanism, against quantities computed by hand."""

import pytest
import torch

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.losses import LossChoice
from trsp_fast.engine.objective import mean_loss
from trsp_fast.engine.session import Session
from trsp_fast.errors import Diverged, UserError
from trsp_fast.models.gates import LayerGates, bypassed
from trsp_fast.run.events import Events
from trsp_fast.select import choose_layers, gate_learning


def config(count=2, **select):
    base = {"steps_per_round": 3, "shortlist": 0}
    return TRSPConfig.from_dict({"num_layers": count, "data": {"batch": 4}, "select": {**base, **select}})


def choose(model, tokens, settings, listener=None):
    return choose_layers(model, tokens, settings, Events(*([listener] if listener else [])))


@pytest.fixture
def quiet_layer(llama):
    """Layer 3 hardly does anything: every sensible method must choose it first."""
    for module in (llama.model.layers[3].self_attn.o_proj, llama.model.layers[3].mlp.down_proj):
        module.weight.data.mul_(1e-3)
    return llama


@pytest.mark.parametrize("schedule", ["iterative", "oneshot"])
def test_the_layer_that_does_nothing_has_the_least_curvature(quiet_layer, tokens, schedule):
    selection = choose(quiet_layer, tokens, config(rank="fisher", schedule=schedule))
    assert selection.layers[0] == 3
    assert len(set(selection.layers)) == 2


@pytest.mark.parametrize("mode", ["residual", "output"])
@pytest.mark.parametrize("schedule", ["iterative", "oneshot"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "natural"])
def test_history_holds_every_gate_gradient_distance_and_loss(llama, tokens, mode, schedule, optimizer):
    settings = config(gate_mode=mode, schedule=schedule, optimizer=optimizer, lr=0.01, rank="magnitude")
    selection = choose(llama, tokens, settings)
    history = selection.history
    assert len(history) == (6 if schedule == "iterative" else 3)
    for entry in history:
        gone = set(selection.layers[: entry["round"]]) | ({5} if mode == "output" else set())
        for name in ("gates", "gradients", "D"):
            assert {i for i, v in enumerate(entry[name]) if v is None} == gone, name
        rows = torch.tensor([[v or 0.0 for v in row] for row in entry["sequence_gradients"]])
        mean = torch.tensor([v or 0.0 for v in entry["gradients"]])
        torch.testing.assert_close(rows.mean(0), mean, rtol=1e-4, atol=1e-6)
        alive = [v for v in entry["gates"] if v is not None]
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + 5e-4 * sum(map(abs, alive)), rel=1e-5)
    assert len(set(selection.layers)) == 2
    last = history[-1]["gates"]
    if optimizer == "adam":
        assert all(abs(v - 1) < 0.1 for v in last if v is not None)


def test_the_first_steps_gradient_is_the_gates_own(llama, tokens):
    settings = config(count=1, optimizer="sgd", lr=0.1, lambda1=0.0)
    entry = choose(llama, tokens[:4], settings).history
    with LayerGates(llama, mode="residual") as gates:
        loss = llama(input_ids=tokens[:4], labels=tokens[:4]).loss
        loss.backward()
    torch.testing.assert_close(torch.tensor(entry[0]["gradients"]), gates.values.grad, rtol=1e-4, atol=1e-6)
    assert entry[0]["lm_loss"] == pytest.approx(float(loss), rel=1e-5)
    moved = torch.tensor(entry[1]["gates"])
    torch.testing.assert_close(moved, 1 - 0.1 * gates.values.grad, rtol=1e-4, atol=1e-6)


def test_the_natural_step_divides_by_the_second_moment(llama, tokens):
    settings = config(count=1, optimizer="natural", lr=0.5, lambda1=1e-3)
    history = choose(llama, tokens[:4], settings).history
    rows = torch.tensor(history[0]["sequence_gradients"])
    step = 0.5 * (rows.mean(0) + 1e-3) / (rows.square().mean(0) + 1e-4)
    torch.testing.assert_close(torch.tensor(history[1]["gates"]), 1 - step, rtol=1e-4, atol=1e-5)


def test_the_l1_term_pulls_gates_to_zero(llama, tokens):
    weak = choose(llama, tokens, config(count=1, optimizer="sgd", lr=0.1, lambda1=0.0)).history[-1]["gates"]
    strong = choose(llama, tokens, config(count=1, optimizer="sgd", lr=0.1, lambda1=2.0)).history[-1]["gates"]
    assert all(s < w - 0.2 for s, w in zip(strong, weak, strict=True))


@pytest.mark.parametrize("reset", [True, False])
def test_gates_are_reset_or_carried_between_rounds(llama, tokens, reset):
    history = choose(llama, tokens, config(optimizer="sgd", lr=0.1, lambda1=1.0, reset_gates=reset)).history
    first_of_second_round = next(entry for entry in history if entry["round"] == 1)["gates"]
    assert all(value == 1.0 for value in first_of_second_round if value is not None) == reset


def test_the_smallest_gate_goes_by_magnitude(llama, tokens):
    selection = choose(llama, tokens, config(optimizer="sgd", lr=0.5, lambda1=0.1, rank="magnitude"))
    assert len(selection.rounds) == 2
    for entry in selection.rounds:
        sizes = [float("inf") if gate is None else abs(gate) for gate in entry["gates"]]
        assert entry["layer"] == sizes.index(min(sizes))
    assert selection.layers == [entry["layer"] for entry in selection.rounds]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_weights_of_low_precision_learn_as_fp32_copies(llama, tokens, dtype):
    model = llama.to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    choose(model, tokens, config(train_weights=True, optimizer="adam", lr=1e-2, weights_lr=1e-3))
    assert {p.dtype for p in model.parameters()} == {dtype}
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > len(before) // 2


def test_gates_of_removed_layers_stop_moving(llama, tokens):
    seen = []
    settings = config(optimizer="adam", lr=0.05, reset_gates=False, rank="magnitude")
    with pytest.MonkeyPatch.context() as patch:
        original = gate_learning._move_gates

        def watched(learning, finite):
            original(learning, finite)
            seen.append((set(learning.alive), learning.gates.values.detach().clone()))

        patch.setattr(gate_learning, "_move_gates", watched)
        choose(llama, tokens, settings)
    gone = next(iter(seen[0][0] - seen[-1][0]))
    assert len({float(values[gone]) for alive, values in seen if gone not in alive}) == 1


def test_a_shortlist_of_all_layers_is_one_round_of_sleb(llama, tokens):
    selection = choose(llama, tokens, config(count=1, shortlist=6))
    losses = []
    for layer in range(6):
        with bypassed(llama, [layer]):
            losses.append(mean_loss(llama, tokens))
    assert selection.layers == [losses.index(min(losses))]


def test_weights_stay_frozen_and_untouched_by_default(llama, tokens):
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    llama.model.norm.weight.requires_grad_(False)
    choose(llama, tokens, config())
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())
    assert [name for name, p in llama.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in llama.parameters())


def test_weights_learn_with_the_gates_when_asked_and_the_jump_is_logged(llama, tokens):
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    seen = []
    settings = config(train_weights=True, optimizer="adam", lr=1e-2, weights_lr=1e-3)
    choose(llama, tokens, settings, lambda kind, values: seen.append((kind, values)))
    assert any(not torch.equal(p, before[name]) for name, p in llama.named_parameters())
    jump = dict(seen)["gates_discarded"]
    assert jump["loss_with_gates"] != jump["loss_without_gates"]


def test_protected_layers_carry_no_gate(llama, tokens):
    selection = choose(llama, tokens, config(protect_first=2, protect_last=2, lambda1=1.0))
    assert set(selection.layers) == {2, 3}
    assert selection.history[0]["gates"][0] is None
    assert selection.history[0]["gates"][5] is None


def test_protecting_more_layers_than_there_are_is_refused(llama, tokens):
    with pytest.raises(UserError, match="only 0 of 6 are not protected"):
        choose(llama, tokens, config(protect_last=7))


def test_too_much_protection_is_refused(llama, tokens):
    with pytest.raises(UserError, match="2 layers are to go but only 1 of 6 are not protected"):
        choose(llama, tokens, config(protect_first=3, protect_last=2))


def test_output_mode_protects_the_last_layer_and_says_so(llama, tokens):
    notes = []
    settings = config(gate_mode="output", lambda1=5.0, optimizer="sgd", lr=0.1, rank="magnitude", count=3)
    selection = choose(llama, tokens, settings, lambda kind, values: notes.append(values.get("text", "")))
    assert 5 not in selection.layers
    assert any("layer 5 carries no gate" in note for note in notes)


def test_in_output_mode_the_last_gate_has_no_gradient(llama, tokens):
    """Why it is protected: the final norm removes the last layer's scale."""
    with LayerGates(llama, mode="output") as gates:
        llama(input_ids=tokens, labels=tokens).loss.backward()
    assert gates.values.grad[5].abs() < 1e-3 * gates.values.grad.abs().max()


def test_three_losses_in_a_row_that_are_not_finite_stop_the_run(llama, tokens):
    with pytest.raises(Diverged, match=r"loss is nan in round 0, step 3 of stage 1 \(calibration windows "):
        choose(llama, tokens, config(optimizer="sgd", lr=1e38, lambda1=1e38, steps_per_round=6))


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "natural"])
def test_a_step_that_is_not_finite_is_not_applied(llama, tokens, monkeypatch, optimizer):
    """Nor does it count in the curvature, nor in Adam's averages: all goes on as if it had not been."""
    original, calls = LossChoice.__call__, []

    def poisoned(loss, batch):
        calls.append(batch)
        return original(loss, batch) * (float("nan") if len(calls) == 2 else 1.0)

    settings = config(count=1, optimizer=optimizer, lr=0.05, steps_per_round=4)
    clean = choose(llama, tokens[:4], config(count=1, optimizer=optimizer, lr=0.05, steps_per_round=3))
    monkeypatch.setattr(LossChoice, "__call__", poisoned)
    history = choose_layers(llama, tokens[:4], settings, session=Session(micro_batch=4)).history
    assert [e["gates"] for e in history[2:]] == [e["gates"] for e in clean.history[1:]]
    assert history[1]["gates"] == history[2]["gates"]


def test_same_seed_same_choice_to_the_bit(llama, tokens):
    one, two = (choose(llama, tokens, config()).history for _ in range(2))
    assert one == two


def test_what_lies_below_the_lowest_gate_is_computed_once(llama, tokens, monkeypatch):
    calls = []
    llama.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    settings = config(count=2, protect_first=3, steps_per_round=4)
    session = Session(micro_batch=4)
    once = choose_layers(llama, tokens, settings, session=session)
    with_prefix = len(calls)
    monkeypatch.setattr(gate_learning.PrefixStates, "build", lambda *_: None)
    again = choose_layers(llama, tokens, settings, session=Session(micro_batch=4))
    assert len(calls) - with_prefix > 2 * with_prefix / 3 > 0
    assert once.layers == again.layers
    for one, other in zip(once.history, again.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        theirs = [value for value in other["gradients"] if value is not None]
        assert [v for v in one["gradients"] if v is not None] == pytest.approx(theirs, rel=1e-4, abs=1e-7)
