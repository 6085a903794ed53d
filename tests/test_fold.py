"""The closed-form start of stage 2 against ridge regression written out, and that it never does harm."""

import copy
import json
import signal
import sys

import pytest
import torch
from ridge import by_hand
from tiny import tiny_llama
from zoo import build

import trsp_fast as trsp
import trsp_fast.fold as folding
from trsp_fast import cli
from trsp_fast.config import TRSPConfig
from trsp_fast.data import with_noise
from trsp_fast.engine.session import Session
from trsp_fast.engine.teacher import InputTap, StoredStates, UntouchedModel
from trsp_fast.errors import UserError
from trsp_fast.fold import fold, fold_points, projections
from trsp_fast.models.gates import bypassed
from trsp_fast.models.streamed_verify import verify_streamed
from trsp_fast.models.verify import require, verify_checkpoints
from trsp_fast.ridge import VALIDATION
from trsp_fast.run.events import Events
from trsp_fast.run.state import Keeper, Stop
from trsp_fast.transfer import transfer


@pytest.fixture
def tokens():
    """Enough for a regression on 48 numbers to say something about windows that it has not seen."""
    return torch.randint(0, 97, (32, 32), generator=torch.Generator().manual_seed(1))


def config(**changes):
    return TRSPConfig.from_dict({"num_layers": 2, "transfer": {"fold": "alone", **changes}})


def states_at(model, tokens, points):
    with InputTap(model, points) as tap, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
        return {point: taken.double() for point, taken in tap.taken.items()}


def folded(model, tokens, layers, weights=None):
    """What `fold` returns, on a model that it changes."""
    teacher = UntouchedModel(copy.deepcopy(model), fold_points(model, layers), 0)
    with bypassed(model, layers):
        return fold(model, teacher, tokens, layers, model.parameters() if weights is None else weights)


def changed(model, before):
    """Names of the parameters that are no longer those of `before`."""
    own = dict(before.named_parameters())
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, own[name])}


@pytest.mark.parametrize(("family", "inner"), [("llama", 48), ("gpt2", 129), ("phi", 49)])
def test_a_layers_change_is_ridge_regression_on_what_is_lacking(tokens, family, inner):
    model = build(family).double() if family != "llama" else tiny_llama(8).double()
    untouched, seen = copy.deepcopy(model), {}
    module = projections(model, tokens[:1])[2]
    handle = module.register_forward_hook(lambda _module, args, _output: seen.update(h=args[0].detach()))
    with bypassed(model, [3, 5]):
        lacking = states_at(untouched, tokens, [4])[4] - states_at(model, tokens, [4])[4]
    handle.remove()
    h, weight = seen["h"], module.weight.detach().clone()
    if module.bias is not None:
        h = torch.cat([h, h.new_ones(*h.shape[:2], 1)], dim=2)
    assert h.shape[2] == inner
    expected = by_hand(h, lacking)
    found = folded(model, tokens, [3, 5])
    got = module.weight.detach() - weight
    got = got.T if isinstance(module, torch.nn.Linear) else got
    torch.testing.assert_close(got, expected[: got.shape[0]], rtol=1e-3, atol=1e-5)
    if module.bias is not None:
        torch.testing.assert_close(
            module.bias.detach() - dict(untouched.named_modules())[name_of(model, module)].bias,
            expected[-1], rtol=1e-3, atol=1e-5,
        )  # fmt: skip
    size = states_at(untouched, tokens, [4])[4].pow(2).sum()
    assert found[2].before == pytest.approx(float(lacking.pow(2).sum() / size), rel=1e-4)
    with bypassed(model, [3, 5]):
        left = states_at(untouched, tokens, [4])[4] - states_at(model, tokens, [4])[4]
    assert found[2].after == pytest.approx(float(left.pow(2).sum() / size), rel=1e-4)


def name_of(model, wanted):
    return next(name for name, module in model.named_modules() if module is wanted)


@pytest.mark.parametrize("layers", [[2, 4], [0, 3], [5], [1, 2, 3]])
def test_every_layer_above_the_gap_comes_nearer_and_nothing_else_changes(llama, tokens, layers):
    before = copy.deepcopy(llama)
    found = folded(llama, tokens, layers)
    kept = [layer for layer in range(6) if layer not in layers]
    below = max((layer for layer in kept if layer < layers[0]), default=kept[0])
    assert set(found) <= {layer for layer in kept if layer >= below}
    assert found
    assert all(one.after < one.before for one in found.values())
    assert changed(llama, before) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in found}


def test_text_it_has_not_seen_comes_nearer_too(llama, tokens):
    fresh = torch.randint(0, 97, (16, 32), generator=torch.Generator().manual_seed(9))
    before = copy.deepcopy(llama)

    def lacking(model):
        with bypassed(model, [2, 4]):
            return float((states_at(before, fresh, [6])[6] - states_at(model, fresh, [6])[6]).pow(2).sum())

    direct = lacking(llama)
    folded(llama, tokens, [2, 4])
    assert lacking(llama) < 0.95 * direct


def test_the_untouched_model_is_run_once(llama, tokens):
    """From layer to layer; where its states cannot be kept, anew for every point, to the same end."""
    twin = copy.deepcopy(llama)
    teacher, passes = UntouchedModel(copy.deepcopy(llama), fold_points(llama, [1, 4]), 0), [0] * 6
    for index, layer in enumerate(teacher.model.model.layers):
        count = lambda _module, _args, index=index: passes.__setitem__(index, passes[index] + 1)  # noqa: E731
        layer.mlp.register_forward_pre_hook(count)
    with bypassed(llama, [1, 4]):
        found = fold(llama, teacher, tokens, [1, 4], llama.parameters())
    assert list(found) == [0, 2, 3, 5]
    assert passes == [2] * 6  # the 32 windows are in two parts
    with pytest.MonkeyPatch.context() as patch, bypassed(twin, [1, 4]):
        patch.setattr(sys.modules["trsp_fast.fold"], "STATES_SHARE", 0.0)
        assert fold(twin, teacher, tokens, [1, 4], twin.parameters()) == {
            layer: one._replace(projection=twin.model.layers[layer].mlp.down_proj) for layer, one in found.items()
        }
    assert changed(llama, twin) == set()


def test_a_layer_that_did_nothing_leaves_everything_as_it_was(llama, tokens):
    with torch.no_grad():
        llama.model.layers[2].self_attn.o_proj.weight.zero_()
        llama.model.layers[2].mlp.down_proj.weight.zero_()
    before = copy.deepcopy(llama)
    assert folded(llama, tokens, [2]) == {}
    assert changed(llama, before) == set()


def test_a_change_that_brings_nothing_nearer_is_taken_back(llama, tokens, monkeypatch):
    """The layers above go on as if it had never been made."""
    other, original, calls = copy.deepcopy(llama), folding.best_change, []

    def first(instead):
        def change(fitting, *more):
            calls.append(instead)
            return instead(fitting.b) if calls.count(instead) == 1 else original(fitting, *more)

        return change

    monkeypatch.setattr(folding, "best_change", first(lambda b: 10 * torch.ones_like(b, dtype=torch.float32)))
    found = folded(llama, tokens, [2, 4])
    monkeypatch.setattr(folding, "best_change", first(lambda _b: None))
    assert found == {
        layer: one._replace(projection=found[layer].projection) for layer, one in folded(other, tokens, [2, 4]).items()
    }
    assert set(found) <= {3, 5}
    assert found
    assert changed(llama, other) == set()


def test_too_few_windows_to_judge_change_nothing(llama, tokens):
    before = copy.deepcopy(llama)
    assert folded(llama, tokens[: VALIDATION - 1], [2]) == {}
    assert changed(llama, before) == set()


# Those in which something else than a sum comes of every layer's last linear map
OTHERWISE = ("gemma2", "gemma3n", "mixtral", "olmo2", "opt, 350m")
FAMILIES = ("bloom", "falcon", "gpt-neox", "gpt2", "granite", "llama4", "opt", "phi", "qwen3", *OTHERWISE)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family_nothing_gets_worse(tokens, family):
    """Where a norm follows the projection, or a token has several streams, a layer stays as it was."""
    model = build(family)
    before, layers = copy.deepcopy(model), [1, 2] if family == "gemma3n" else [3, 5]  # others hold what it shares
    found = folded(model, tokens, layers)
    assert all(one.after < one.before for one in found.values())
    modules = projections(model, tokens[:1])
    allowed = {id(p) for layer in found for p in modules[layer].parameters()}
    named = dict(model.named_parameters())
    assert {id(named[name]) for name in changed(model, before)} <= allowed
    assert bool(found) == (family not in OTHERWISE)
    if family == "opt":
        assert all(one.projection is model.model.decoder.layers[layer].fc2 for layer, one in found.items())


def test_a_layer_that_scales_what_it_adds_is_folded_with_that_scale(tokens):
    """Granite's residual multiplier: the same model written without it is folded to the same states."""
    one, other = build("granite"), build("granite")
    scale = one.config.residual_multiplier
    assert scale != 1
    for layer in other.model.layers:
        layer.residual_multiplier = 1.0
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.data.mul_(scale)
    first, second = folded(one, tokens, [3, 5]), folded(other, tokens, [3, 5])
    assert first.keys() == second.keys() != set()
    for layer, mine in first.items():
        assert (mine.before, mine.after) == pytest.approx((second[layer].before, second[layer].after), rel=1e-3)


def test_a_projection_of_two_layers_is_left_alone(llama, tokens):
    llama.model.layers[3].mlp.down_proj.weight = llama.model.layers[1].mlp.down_proj.weight
    before = copy.deepcopy(llama)
    found = folded(llama, tokens, [2])
    assert found
    assert not {1, 3} & set(found)
    assert "model.layers.1.mlp.down_proj.weight" not in changed(llama, before)


def test_a_bias_of_two_layers_is_left_alone_and_their_weights_are_not(tokens):
    model = build("gpt2")
    model.transformer.h[3].mlp.c_proj.bias = model.transformer.h[1].mlp.c_proj.bias
    before = copy.deepcopy(model)
    assert {1, 3} <= set(folded(model, tokens, [2]))
    assert "transformer.h.1.mlp.c_proj.bias" not in changed(model, before)
    assert "transformer.h.1.mlp.c_proj.weight" in changed(model, before)


@pytest.mark.parametrize(("hidden", "points"), [(0.0, []), (1.0, [1, 3, 5, 6])])
def test_states_for_the_fold_alone_are_gone_before_training(llama, tokens, monkeypatch, hidden, points):
    module, teachers = sys.modules["trsp_fast.transfer"], []

    def watched(model, teacher, *rest):
        assert isinstance(teacher, StoredStates)
        assert set(fold_points(model, [2, 4])) <= set(teacher.inputs)
        teachers.append((teacher, teacher.held))
        return plain(model, teacher, *rest)

    plain = module._fold
    monkeypatch.setattr(module, "_fold", watched)
    transfer(llama, tokens, [2, 4], config(fold="start", epochs=1, hidden=hidden))
    ((teacher, held),) = teachers
    assert sorted(teacher.inputs) == points
    assert (teacher.held < held) == (not hidden)


def test_alone_is_a_stage_2_without_training(llama, tokens):
    twin, events = copy.deepcopy(llama), []
    assert transfer(llama, tokens, [2, 4], config(), Events(lambda *event: events.append(event))) == []
    found = folded(twin, with_noise(tokens, config().transfer.noise, config().seed), [2, 4])
    assert changed(llama, twin) == set()
    told = next(values for kind, values in events if kind == "folded")["layers"]
    assert told == [
        {"layer": layer, "projection": "mlp.down_proj", "before": one.before, "after": one.after}
        for layer, one in found.items()
    ]
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in llama.parameters())


def test_training_begins_with_the_fold(llama, tokens):
    losses = {}
    for fold_setting in ("none", "start"):
        values = {"fold": fold_setting, "epochs": 1, "lr": 0.0}
        losses[fold_setting] = transfer(copy.deepcopy(llama), tokens, [2, 4], config(**values))[0]["loss"]
    assert losses["start"] < 0.9 * losses["none"]


def test_only_weights_that_may_be_trained_are_folded(llama, tokens):
    before = copy.deepcopy(llama)
    transfer(llama, tokens, [1], config(trainable="neighbours"))
    assert changed(llama, before) == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 2)}


def test_in_lower_precision_weights_come_back_in_it(llama, tokens):
    llama = llama.to(torch.bfloat16)
    before = copy.deepcopy(llama)
    transfer(llama, tokens, [2, 4], config())
    assert not torch.is_autocast_enabled("cpu")
    assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}
    assert len(changed(llama, before)) >= 3


def test_states_that_do_not_fit_are_computed_anew(llama, tokens, monkeypatch):
    twin = copy.deepcopy(llama)
    found = folded(llama, tokens, [2, 4])
    monkeypatch.setattr("trsp_fast.fold.free_memory", lambda *_: 0)
    again = folded(twin, tokens, [2, 4])
    assert again.keys() == found.keys()
    for layer, one in again.items():
        assert (one.before, one.after) == pytest.approx((found[layer].before, found[layer].after), rel=1e-4)


@pytest.mark.parametrize("changes", [{"gate": "none"}, {"hold": 0.5}])
def test_a_fold_needs_the_layers_gone(llama, tokens, changes):
    with pytest.raises(UserError, match=r"transfer.fold is alone but the layers leave later"):
        config(**changes)
    events = []
    settings = config(fold="start", epochs=1, lr=0.0, **changes)
    transfer(llama, tokens[:4], [2], settings, Events(lambda *event: events.append(event)))
    assert "folded" not in [kind for kind, _ in events]


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_says_what_was_folded(llama, tokens, tmp_path, epochs):
    llama.save_pretrained(tmp_path / "source")
    values = {"fold": "alone"} if not epochs else {"epochs": epochs}
    settings = TRSPConfig.from_dict({"layers": [2, 4], "transfer": values})
    result = trsp.prune(llama, tokens, settings, out=tmp_path / "out", evaluation=tokens)
    assert len(result.history["transfer"]) == 8 * epochs
    folded_layers = [entry["layer"] for entry in result.history["fold"]]
    assert folded_layers == sorted({1, 3, 5} & set(folded_layers)) != []
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["fold"] == result.history["fold"]
    assert report["trained"]
    assert report["tokens"]["trained_on"] == tokens.numel() * epochs
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"folded into {len(folded_layers)} of the others: the hidden states behind layer {folded_layers[-1]}" in page
    card = (tmp_path / "out" / "README.md").read_text()
    assert "folded in closed form" in card
    assert ("tokens were trained on" in card) == (epochs > 0)
    assert {entry["projection"] for entry in result.history["fold"]} == {"mlp.down_proj"}
    names = dict.fromkeys(folded_layers, "mlp.down_proj")
    for prove in (verify_checkpoints, verify_streamed):
        require(prove(tmp_path / "source", tmp_path / "out", [2, 4], trained=True, folded=names))
        for wrong in ([1, 4], [2, 3]):
            checks = prove(tmp_path / "source", tmp_path / "out", wrong, trained=True, folded=names)
            assert not all(check.passed for check in checks)


@pytest.mark.parametrize("prove", [verify_checkpoints, verify_streamed])
def test_a_folded_projection_may_be_far_from_its_source_and_no_other(llama, tmp_path, prove):
    llama.save_pretrained(tmp_path / "source")
    small = trsp.remove_layers(copy.deepcopy(llama), [2])
    with torch.no_grad():
        small.model.layers[2].mlp.down_proj.weight.mul_(-3)  # layer 3 of the source
    small.save_pretrained(tmp_path / "out")
    checks = prove(tmp_path / "source", tmp_path / "out", [2], trained=True, folded={3: "mlp.down_proj", 4: "mlp.no"})
    assert all(check.passed for check in checks)
    detail = next(c.detail for c in checks if c.name == "weights are near their source")
    assert "at most 0.00, " in detail
    assert "of 1 folded ones at most 4.00, " in detail
    for other in (None, {}, {2: "mlp.down_proj"}, {4: "mlp.down_proj"}, {3: "mlp.up_proj"}):
        checks = prove(tmp_path / "source", tmp_path / "out", [2], trained=True, folded=other)
        assert [check.name for check in checks if not check.passed] == ["weights are near their source"]


@pytest.mark.parametrize("prove", [verify_checkpoints, verify_streamed])
@pytest.mark.parametrize("value", [5.0, float("nan")])
def test_a_folded_projection_is_not_anything_at_all(llama, tmp_path, prove, value):
    llama.save_pretrained(tmp_path / "source")
    small = trsp.remove_layers(copy.deepcopy(llama), [2])
    with torch.no_grad():
        small.model.layers[2].mlp.down_proj.weight.fill_(value)
    small.save_pretrained(tmp_path / "out")
    checks = prove(tmp_path / "source", tmp_path / "out", [2], trained=True, folded={3: "mlp.down_proj"})
    assert "weights are near their source" in [check.name for check in checks if not check.passed]


def test_where_nothing_can_be_folded_it_says_so(tokens):
    cases = (
        (build("gemma3n"), tokens, "the fold changed nothing"),
        (tiny_llama(), tokens[: VALIDATION - 1], "every 4th window judges it, and there are 3; set data.samples to 4"),
    )
    for model, windows, said in cases:
        before, notes = copy.deepcopy(model), []
        listener = Events(lambda kind, values, notes=notes: notes.append(values["text"]) if kind == "note" else None)
        assert transfer(model, windows, [1], config(), listener) == []
        assert said in notes[-1]
        assert changed(model, before) == set()


def test_no_layers_no_fold(llama, tokens):
    before = copy.deepcopy(llama)
    assert transfer(llama, tokens, [], config()) == []
    assert changed(llama, before) == set()


def test_a_wish_to_end_ends_a_fold(llama, tokens):
    """There is nothing to save in it, so that nothing is waited for."""
    stop = Stop()

    def ask(kind, _values):
        if kind == "teacher":
            stop._receive(signal.SIGTERM, None)

    session = Session(Events(ask), keeper=Keeper(None, 0, stop))
    with pytest.raises(SystemExit) as end:
        transfer(llama, tokens, [2], config(), session=session)
    assert end.value.code == 143


@pytest.mark.parametrize(("changes", "most"), [({"fold": "none", "epochs": 0}, 0), ({}, 4)])
def test_a_fold_of_weights_that_are_not_gone_on_with_is_forgotten(llama, tokens, changes, most):
    session = Session()
    session.keeper.facts["folded"] = [{"layer": 0}]
    transfer(llama, tokens, [2], config(**changes), session=session)
    entries = session.keeper.facts.get("folded", [])
    assert {"layer": 0} not in entries
    assert len(entries) <= most


@pytest.mark.parametrize("entries", [None, 5, [1], "x", {"a": 1}, [{}], [{"layer": "x", "projection": "y"}]])
def test_a_report_without_sense_is_one_sentence(llama, tmp_path, capsys, monkeypatch, entries):
    for name, model in (("source", llama), ("out", trsp.remove_layers(llama, [2]))):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "out" / "report.json").write_text(json.dumps({"trained": True, "fold": entries}))
    command = ["trsp-fast", "verify", str(tmp_path / "source"), str(tmp_path / "out"), "--removed", "2"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "holds no list of folds" in capsys.readouterr().err
