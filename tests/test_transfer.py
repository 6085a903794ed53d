"""Stage 2: schedules, penalty and objectives by hand, and that it does what it is for."""

import copy
import importlib
import sys

import pytest
import torch
from tiny import tiny_llama

from trsp_fast.config import TransferConfig, TRSPConfig
from trsp_fast.data import with_noise
from trsp_fast.engine.distributed import Group
from trsp_fast.engine.objective import mean_loss
from trsp_fast.engine.optimizers import adamw, load_optimizer_state, optimizer_state
from trsp_fast.engine.session import Session, place_of_states
from trsp_fast.engine.teacher import rows_on
from trsp_fast.errors import Diverged, Interrupted, UserError
from trsp_fast.models.gates import LayerGates, bypassed
from trsp_fast.run.events import Events
from trsp_fast.run.state import Keeper, StateStore, Stop
from trsp_fast.transfer import (
    gate_at,
    hidden_at,
    lambda2_at,
    learning_rate_factor,
    trainable_weights,
    transfer,
)

transfer_module = importlib.import_module("trsp_fast.transfer")  # the package has a function of that name

PLAIN = {
    "objective": "lm",
    "hidden": 0.0,
    "hidden_schedule": "constant",
    "noise": 0.0,
    "fold": "none",
    "gate": "none",
    "lambda2": 0.0,
    "epochs": 2,
    "lr": 1e-3,
    "gap_lr": 1.0,
    "warmup": 0.0,
    "detach_input": False,
}


def config(**changes):
    return TRSPConfig.from_dict({"num_layers": 2, "data": {"batch": 4}, "transfer": {**PLAIN, **changes}})


def distances(model, tokens, layers, norm="l2"):
    with torch.no_grad(), LayerGates(model, mode=None, layers=layers) as gates:
        model(input_ids=tokens, use_cache=False)
        return {layer: float(d) for layer, d in gates.distances(norm).items()}


def test_the_first_step_is_adamw_on_loss_plus_penalty_written_out(llama, tokens):
    twin, layers = copy.deepcopy(llama), [1, 4]
    tokens = tokens[:4]
    history = transfer(llama, tokens, layers, config(lambda2=0.7, epochs=1, clip=0.5))
    states = twin(input_ids=tokens, labels=tokens, output_hidden_states=True)
    hidden = states.hidden_states
    penalty = sum((hidden[i + 1] - hidden[i]).square().flatten(1).mean(1).sqrt().mean() for i in layers)
    (states.loss + 0.7 * penalty).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0).step()
    assert len(history) == 1
    assert history[0]["penalty"] == pytest.approx(0.7 * float(penalty.detach()), rel=1e-4)
    assert history[0]["loss"] == pytest.approx(float((states.loss + 0.7 * penalty).detach()), rel=1e-4)
    assert history[0]["gradient_norm"] == pytest.approx(float(norm), rel=1e-3)
    for one, other in zip(llama.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("norm", ["l1", "l2", "frobenius"])
def test_history_names_the_distance_that_is_penalised(llama, tokens, norm):
    before = distances(llama, tokens[:4], [1, 4], norm)
    entry = transfer(llama, tokens[:4], [1, 4], config(norm=norm, lambda2=0.1, epochs=1))[0]
    assert entry["D"] == pytest.approx(before, rel=1e-4)
    assert entry["penalty"] == pytest.approx(0.1 * sum(before.values()), rel=1e-4)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("norm", ["l1", "l2", "frobenius"])
def test_the_penalty_makes_the_layers_removable(llama, tokens, norm, detach):
    before = distances(llama, tokens, [1, 4])
    scale = 0.01 if norm == "frobenius" else 1.0
    transfer(llama, tokens, [1, 4], config(norm=norm, lambda2=3.0 * scale, epochs=40, detach_input=detach, lr=3e-3))
    after = distances(llama, tokens, [1, 4])
    assert all(after[layer] < 0.5 * before[layer] for layer in (1, 4)), (before, after)


def test_annealed_gates_make_the_cut_change_nothing(llama, tokens):
    history = transfer(llama, tokens, [1, 4], config(gate="anneal", hold=0.5, objective="distill", epochs=4))
    assert history[0]["gate"] == 1
    assert [entry["gate"] for entry in history[4:]] == [0.0] * 4
    assert all(entry["D"][1] is None for entry in history[4:])
    with bypassed(llama, [1, 4]):
        cut = mean_loss(llama, tokens)
    assert cut < mean_loss(llama, tokens)  # the layers that stay have learned to do without


def test_gate_and_penalty_act_together(llama, tokens):
    history = transfer(llama, tokens, [2], config(gate="anneal", hold=0.25, lambda2=1.0, epochs=20, lr=3e-3))
    assert history[-1]["gate"] == 0
    assert history[-1]["D"][2] < 0.5 * history[0]["D"][2]


def test_held_layers_are_still_pushed_to_identity_by_a_detached_penalty(llama, tokens):
    """At gate 0 only the detached evaluation of the layer is left; it must go on, and change nothing else."""
    twin = copy.deepcopy(llama)
    settings = {"gate": "anneal", "hold": 1.0, "epochs": 20, "lr": 3e-3}
    history = transfer(llama, tokens, [2], config(**settings, lambda2=1.0, detach_input=True, clip=0.0))
    assert history[-1]["D"][2] < 0.5 * history[0]["D"][2]
    plain = transfer(twin, tokens, [2], config(**settings, clip=0.0))
    assert [e["lm_loss"] for e in history] == pytest.approx([e["lm_loss"] for e in plain], rel=1e-4)


def test_distillation_pulls_towards_the_untouched_model(llama, tokens):
    """From the untouched model itself the first loss is 0; with layers cut first it falls."""
    first = transfer(copy.deepcopy(llama), tokens, [1], config(objective="distill", epochs=1))[0]
    assert first["loss"] == pytest.approx(0, abs=1e-5)
    history = transfer(llama, tokens, [1], config(objective="distill", gate="anneal", hold=1.0, epochs=30, lr=3e-3))
    assert history[0]["loss"] > 0.05
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


def test_hidden_states_are_pulled_towards_the_untouched_models(llama, tokens):
    """From the untouched model itself the first distance is 0; with layers cut first it falls, without logits too."""
    settings = {"objective": "lm", "hidden": 20.0, "epochs": 1}
    assert transfer(copy.deepcopy(llama), tokens, [1], config(**settings))[0]["hidden"] == pytest.approx(0, abs=1e-9)
    settings |= {"gate": "anneal", "hold": 1.0, "epochs": 30, "lr": 3e-3}
    without = transfer(copy.deepcopy(llama), tokens, [1, 5], config(**settings | {"hidden": 1e-9}))
    history = transfer(llama, tokens, [1, 5], config(**settings))
    assert history[0]["hidden"] > 0.05
    assert history[-1]["hidden"] < 0.9 * history[0]["hidden"]
    assert without[-1]["hidden"] > without[0]["hidden"]
    assert history[0]["loss"] == pytest.approx(history[0]["lm_loss"] + history[0]["hidden"])


def test_both_models_see_the_noise(llama, tokens):
    """A run with noise is the run without on windows that have it, so that from the untouched model the loss is 0."""
    with_it = copy.deepcopy(llama)
    settings = {"objective": "distill", "gate": "anneal", "hold": 1.0, "fold": "start", "hidden": 1.0}
    history = transfer(with_it, tokens, [1], config(**settings, noise=0.3))
    plain = transfer(llama, tokens, [1], config(**settings))
    assert history[0]["loss"] != plain[0]["loss"]
    fresh = tiny_llama()
    noisy = with_noise(tokens, 0.3, 0)
    assert transfer(fresh, noisy, [1], config(**settings)) == history
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), with_it.parameters(), strict=True))
    assert transfer(tiny_llama(), tokens, [1], config(objective="distill", noise=0.3))[0]["loss"] == pytest.approx(
        0, abs=1e-5
    )


def test_text_that_is_learned_itself_stays_as_it_is(llama, tokens):
    twin = copy.deepcopy(llama)
    settings = {"gate": "anneal", "hold": 1.0, "hidden": 1.0, "fold": "start"}
    plain = transfer(twin, tokens, [1], config(**settings))
    assert transfer(llama, tokens, [1], config(**settings, noise=0.5)) == plain
    assert TransferConfig(objective="lm", fold="alone", noise=0.5).replaced == 0.5  # nothing is learned from the text


@pytest.mark.parametrize("trainable", ["all", "neighbours"])
def test_stored_states_are_the_untouched_model(llama, tokens, trainable, monkeypatch):
    """The same history whether states were stored or a second model is asked, at both ends of the stack."""
    settings = config(objective="distill", hidden=1.0, gate="anneal", hold=0.5, epochs=3, lr=3e-3, trainable=trainable)
    twin, seen = copy.deepcopy(llama), []
    stored = transfer(
        llama, tokens, [2, 5], settings, Events(lambda kind, v: seen.append(v) if kind == "teacher" else None)
    )
    monkeypatch.setattr("trsp_fast.engine.session.HOST_STATES_SHARE", 1 << 60)
    asked = transfer(
        twin, tokens, [2, 5], settings, Events(lambda kind, v: seen.append(v) if kind == "teacher" else None)
    )
    assert [event["stored"] for event in seen] == [True, False]
    for name in ("loss", "hidden", "lm_loss"):
        assert [e[name] for e in stored] == pytest.approx([e[name] for e in asked], rel=2e-5, abs=1e-7)


def test_where_the_untouched_models_states_are_kept(monkeypatch):
    gpu = torch.device("cuda", 0)
    free = {"cuda": 80, "cpu": 400}
    monkeypatch.setattr("trsp_fast.engine.session.free_memory", lambda device: free[device.type])
    assert place_of_states(10, gpu, 0)[0] == "cuda"
    assert place_of_states(11, gpu, 0)[0] == "cpu"
    assert place_of_states(10, gpu, 1)[0] == "cpu"
    assert place_of_states(100, gpu, 0)[0] == "cpu"
    assert place_of_states(101, gpu, 0)[0] is None
    assert place_of_states(101, torch.device("cpu"), 0)[0] is None
    assert place_of_states(100, torch.device("cpu"), 4)[0] is None


def test_rows_that_are_copied_one_by_one():
    stored, rows = torch.randn(5, 3, 2), torch.tensor([3, 0, 3])
    assert torch.equal(rows_on(stored, rows, torch.device("cpu")), stored[rows])


def test_more_steps_than_the_finished_stage_had_begin_with_a_new_optimiser(llama, tokens, tmp_path):
    notes = []

    def run(epochs):
        events = Events(lambda kind, values: notes.append(values["text"]) if kind == "note" else None)
        session = Session(events, keeper=Keeper(StateStore(tmp_path), every=1))
        return transfer(llama, tokens, [2], config(epochs=epochs), events, session=session)

    steps = len(run(1))
    assert not notes
    assert len(run(2)) == 2 * steps
    assert [note for note in notes if "optimiser was not kept" in note]


def test_the_hidden_distance_is_its_definition(llama, tokens):
    """Mean over the layers that stay, but the first, and the end of the stack, against a loop by hand."""
    settings = config(objective="distill", hidden=3.0, gate="anneal", hold=1.0, epochs=1, lr=0.0)
    with torch.no_grad():
        whole = llama(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[:-1]
        last = []
        handle = llama.model.layers[-1].register_forward_hook(lambda m, a, out: last.append(out))
        llama(input_ids=tokens, use_cache=False)
        with bypassed(llama, [2, 3]):
            cut = llama(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states[:-1]
        handle.remove()
    pairs = [(cut[i], whole[i]) for i in (1, 4, 5)] + [(last[1], last[0])]
    shares = [((a - b).square().flatten(1).sum(1) / b.square().flatten(1).sum(1)).mean() for a, b in pairs]
    history = transfer(llama, tokens, [2, 3], TRSPConfig.from_dict(settings.to_dict() | {"data": {"batch": 8}}))
    assert history[0]["hidden"] == pytest.approx(3.0 * float(torch.stack(shares).mean()), rel=1e-5)


def test_cut_first_leaves_the_cut_layers_untouched(llama, tokens):
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    transfer(llama, tokens, [1, 4], config(gate="anneal", hold=1.0))
    changed = {name for name, p in llama.named_parameters() if not torch.equal(p, before[name])}
    assert not any(name.startswith(("model.layers.1.", "model.layers.4.")) for name in changed)
    assert any(name.startswith("model.layers.2.") for name in changed)


def test_layers_out_of_the_function_from_the_start_are_not_trained(llama):
    """They need no fp32 copies, no moments and no place in a state; a tied or shared weight stays."""
    cut = config(gate="anneal", hold=1.0).transfer
    trained = transfer_module.trained_weights(llama, [1, 4], cut)
    assert {name.split(".")[2] for name in trained if ".layers." in name} == {"0", "2", "3", "5"}
    assert "model.embed_tokens.weight" in trained
    for other in ({"hold": 0.9}, {"gate": "none"}, {"lambda2": 1.0}):
        settings = config(**{"gate": "anneal", "hold": 1.0, **other}).transfer
        assert len(transfer_module.trained_weights(llama, [1, 4], settings)) == len(dict(llama.named_parameters()))


def test_the_state_of_a_weight_without_gradients_is_none(llama, tokens):
    """An expert that no token has reached yet: its optimiser state begins when the uninterrupted run's would."""
    named = {name: p for name, p in llama.named_parameters() if ".layers." in name}
    twin = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
    optimizer = adamw(named.values(), 1e-3, (0.9, 0.95))
    llama(input_ids=tokens, labels=tokens).loss.backward()
    without = [name for name in named if ".layers.3." in name]
    for name in without:
        named[name].grad = None
    optimizer.step()
    found, other = optimizer_state(optimizer, named), adamw(twin.values(), 1e-3, (0.9, 0.95))
    load_optimizer_state(other, twin, found)
    again = optimizer_state(other, twin)
    assert again.keys() == found.keys()
    assert not any(".layers.3." in name for name in again)
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_no_epochs_no_change(llama, tokens):
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    assert transfer(llama, tokens, [1], config(epochs=0)) == []
    assert all(torch.equal(p, before[name]) for name, p in llama.named_parameters())


def test_low_precision_weights_train_as_fp32_copies(llama, tokens):
    model = llama.to(torch.bfloat16)
    inv_freq = model.model.rotary_emb.inv_freq.clone()
    before = mean_loss(model, tokens)
    history = transfer(model, tokens, [1], config(epochs=20, lr=2e-3))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, inv_freq)
    assert history[-1]["lm_loss"] < before - 0.2


def test_three_losses_that_are_not_finite_stop_and_keep_the_last_weights(llama, tokens):
    llama.train().requires_grad_(True)
    seen = []
    events = Events(lambda _kind, _values: seen.append([p.detach().clone() for p in llama.parameters()]))
    with pytest.raises(Diverged, match="in step 3 of stage 2"):
        transfer(llama, tokens, [1], config(lr=1e30, clip=0.0, epochs=4), events)
    assert llama.training
    assert all(torch.equal(p, last) for p, last in zip(llama.parameters(), seen[-1], strict=True))


@pytest.mark.parametrize("objective", ["lm", "distill"])
@pytest.mark.parametrize("gate", ["none", "anneal"])
def test_micro_batches_change_losses_and_gradients_by_rounding_only(llama, tokens, objective, gate):
    settings = config(objective=objective, gate=gate, lambda2=0.5, epochs=1)
    whole = transfer(copy.deepcopy(llama), tokens, [1, 4], settings)
    parts = transfer(llama, tokens, [1, 4], settings, session=Session(micro_batch=3))
    for one, other in zip(whole, parts, strict=True):
        assert other["D"] == pytest.approx(one["D"], rel=1e-5, nan_ok=True)
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4, abs=1e-6)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


@pytest.mark.slow
def test_moments_in_8_bits_learn_and_resume_to_the_same_bits(tmp_path, tokens):
    pytest.importorskip("torchao", reason="needs the package torchao")
    model = tiny_llama(hidden_size=64)  # torchao keeps the moments of weights below 4,096 elements as they are
    settings = config(optimizer="adamw8bit", epochs=4)
    whole = transfer(copy.deepcopy(model), tokens, [1], settings)
    plain = transfer(copy.deepcopy(model), tokens, [1], config(epochs=4))
    assert [e["loss"] for e in whole] == pytest.approx([e["loss"] for e in plain], rel=2e-2)
    assert [e["loss"] for e in whole] != [e["loss"] for e in plain]
    stop = Stop()

    def interrupt(kind, values):
        if kind == "transfer_step" and values["step"] == 3:
            stop.code = 143

    keeper = Keeper(StateStore(tmp_path), stop=stop)
    with pytest.raises(Interrupted):
        transfer(copy.deepcopy(model), tokens, [1], settings, session=Session(Events(interrupt), keeper))
    again = transfer(model, tokens, [1], settings, session=Session(keeper=Keeper(StateStore(tmp_path))))
    assert again == whole


def test_8_bits_need_torchao(llama, tokens, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"install trsp_fast\[torchao\]"):
        transfer(llama, tokens, [1], config(optimizer="adamw8bit"))


def test_neighbours_alone_learn_and_the_rest_is_shared_with_the_teacher(llama, tokens):
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    transfer(llama, tokens, [2, 3], config(trainable="neighbours", objective="distill", gate="anneal", epochs=2))
    changed = {name for name, p in llama.named_parameters() if not torch.equal(p, before[name])}
    layers = {name.split(".")[2] for name in changed if name.startswith("model.layers") and "norm" not in name}
    assert layers == {"1", "4"}
    assert "model.norm.weight" in changed
    assert "model.embed_tokens.weight" not in changed
    named = trainable_weights(llama, [2, 3], "neighbours")
    teacher = Group().untouched(llama, named)
    for (name, own), theirs in zip(llama.named_parameters(), teacher.parameters(), strict=True):
        assert (own is theirs) == (name not in named)


@pytest.mark.parametrize(
    ("hold", "expected"), [(0.0, [1, 2 / 3, 1 / 3, 0]), (0.5, [1, 0.5, 0, 0]), (1.0, [0, 0, 0, 0])]
)
def test_gate_schedule(hold, expected):
    settings = TransferConfig(gate="anneal", hold=hold)
    assert [gate_at(settings, step, 4) for step in range(4)] == pytest.approx(expected)


def test_hidden_schedule(llama, tokens):
    fall = TransferConfig(hidden=2.0, hidden_schedule="fall")
    assert [hidden_at(fall, s, 4) for s in range(4)] == [2, 1.5, 1, 0.5]
    assert hidden_at(TransferConfig(hidden=2.0, hidden_schedule="constant"), 3, 4) == 2
    settings = {"objective": "distill", "hidden": 2.0, "gate": "anneal", "hold": 1.0, "lr": 0.0, "epochs": 2}
    runs = [transfer(llama, tokens, [2], config(**settings, hidden_schedule=s)) for s in ("constant", "fall")]
    shares = [fell["hidden"] / constant["hidden"] for constant, fell in zip(*runs, strict=True)]
    assert shares == pytest.approx([1 - step / len(shares) for step in range(len(shares))], rel=1e-5)


def test_lambda_schedule():
    assert [lambda2_at(TransferConfig(lambda2=2.0, lambda_schedule="grow"), s, 4) for s in range(4)] == [0.5, 1, 1.5, 2]
    assert lambda2_at(TransferConfig(lambda2=2.0, lambda_schedule="constant"), 0, 4) == 2


def test_learning_rate_warms_up_and_decays():
    factors = [learning_rate_factor(0.2, step, 10) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[-1] == pytest.approx(1 / 8)
    assert [learning_rate_factor(0.0, step, 2) for step in range(2)] == [1.0, 0.5]
