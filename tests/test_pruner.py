"""prune() as a whole: what it hands back, on a tiny model and on the built-in one."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import trsp_fast as trsp
from trsp_fast.data import calibration_windows, demo_model, evaluation_windows, load_streams
from trsp_fast.engine.objective import mean_loss
from trsp_fast.errors import CheckFailed, UserError
from trsp_fast.models.checkpoint import load_model, load_tokenizer
from trsp_fast.models.gates import bypassed
from trsp_fast.models.verify import same_bytes, verify_removal
from trsp_fast.select import choose_layers
from trsp_fast.transfer import transfer


def config(**values):
    base = {"num_layers": 2, "data": {"batch": 4}, "select": {"steps_per_round": 1}, "transfer": {"epochs": 1}}
    return trsp.TRSPConfig.from_dict({**base, **values})


def test_result_model_history_and_checkpoint_agree(llama, tokens, tmp_path):
    result = trsp.prune(llama, tokens, config(), out=tmp_path / "out", evaluation=tokens)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ours, theirs = result.model.state_dict(), reloaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same_bytes(ours[name], theirs[name]) for name in ours)
    assert len(result.history["select"]) == 2
    assert len(result.history["transfer"]) == 2
    assert result.perplexity["pruned"] == pytest.approx(trsp.perplexity(reloaded, tokens), rel=1e-5)
    assert all(check.passed for check in result.checks)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["perplexity"] == result.perplexity


def test_without_out_nothing_is_written(llama, tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = trsp.prune(llama, tokens, config(), evaluation=tokens)
    assert result.model.config.num_hidden_layers == 4
    assert result.out is None
    assert result.perplexity["pruned"] == pytest.approx(trsp.perplexity(result.model, tokens), rel=1e-5)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("run", ["float32", "bfloat16"])
def test_no_transfer_means_the_sources_own_bytes(llama, tokens, tmp_path, source, run):
    model = llama.to(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = config(num_layers=None, layers=[5], dtype=run, transfer={"epochs": 0})
    trsp.prune(model, tokens, settings, out=tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert same_bytes(tensor, before[name]), name


def test_trained_export_has_the_sources_dtype(llama, tokens, tmp_path):
    trsp.prune(llama.to(torch.bfloat16), tokens, config(), out=tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_same_seed_same_checkpoint_to_the_byte(tokens, tmp_path, llama):
    for name in ("a", "b"):
        trsp.prune(copy.deepcopy(llama), tokens, config(seed=7), out=tmp_path / name)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert a == b


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_holds_inside_the_run_only(llama, tokens, monkeypatch, before):
    seen = []
    original = verify_removal
    monkeypatch.setattr(
        "trsp_fast.pruner.verify_removal",
        lambda *arguments: seen.append(torch.are_deterministic_algorithms_enabled()) or original(*arguments),
    )
    torch.use_deterministic_algorithms(before)
    try:
        trsp.prune(llama, tokens, config(run={"deterministic": True}, transfer={"epochs": 0}))
        assert seen == [True]
        assert torch.are_deterministic_algorithms_enabled() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_unproven_export_is_not_written(llama, tokens, tmp_path, monkeypatch):
    def forgetful(model, layers):
        small = trsp.remove_layers(model, layers)
        small.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(small.model.layers[0].mlp.up_proj.weight * 1.01)
        return small

    monkeypatch.setattr("trsp_fast.pruner.remove_layers", forgetful)
    with pytest.raises(CheckFailed, match="bypassed logits = pruned logits"):
        trsp.prune(llama, tokens, config(), out=tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(4, 8), "tokens are torch.float32"),
        (torch.zeros(8, dtype=torch.long), r"\[8\]"),
        (torch.zeros(4, 1, dtype=torch.long), "seq at least 2"),
        (torch.full((4, 8), 97), "the data has token 97"),
    ],
)
def test_bad_tokens_are_refused(llama, tokens, message):
    with pytest.raises(UserError, match=message):
        trsp.prune(llama, tokens, config())


def test_a_bound_without_evaluation_is_refused(llama, tokens):
    with pytest.raises(UserError, match="nothing to evaluate on"):
        trsp.prune(llama, tokens, config(quality={"max_perplexity_ratio": 2.0}))


@pytest.fixture(scope="module")
def demo():
    """The built-in model, calibration and evaluation windows of this interpreter's library."""
    model = load_model(str(demo_model()), dtype="float32", device="cpu")
    streams = load_streams("demo", load_tokenizer(str(demo_model())))
    return model, calibration_windows(streams.calibration, 128, 256, 0), evaluation_windows(streams.evaluation, 256, 32)


@pytest.fixture(scope="module")
def chosen(demo):
    """What the default preset would do to the built-in model, and the layers it chooses."""
    model, tokens, _ = demo
    settings = trsp.TRSPConfig.from_dict({"num_layers": 3})
    return settings, sorted(choose_layers(model, tokens, settings).layers)


def test_the_demo_model_knows_its_subject(demo):
    model, _, evaluation = demo
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(2.7e6, rel=0.05)
    assert trsp.perplexity(model, evaluation) < 18  # 32 windows of whatever library this interpreter has
    assert sum(f.stat().st_size for f in demo_model().iterdir()) < 8_000_000


@pytest.mark.slow
def test_the_choice_is_far_better_than_the_worst(demo, chosen):
    (model, _, evaluation), (_, layers) = demo, chosen
    assert len(layers) == 3
    assert 0 not in layers  # without it the model knows nothing
    with bypassed(model, layers):
        chosen = mean_loss(model, evaluation)
    with bypassed(model, [9, 10, 11]):
        last = mean_loss(model, evaluation)
    assert chosen < last


@pytest.mark.slow
def test_stage_2_moves_the_knowledge_out(demo, chosen):
    """Preset two-stage: D falls by half, and of the jump in loss at the cut at most a quarter is left."""
    (model, tokens, evaluation), (_, layers) = demo, chosen
    settings, model = trsp.TRSPConfig.from_preset("two-stage", num_layers=3), copy.deepcopy(model)
    dense = mean_loss(model, evaluation)
    with bypassed(model, layers):
        jump = mean_loss(model, evaluation) - dense
    history = transfer(model, tokens, layers, settings)
    first, last = history[0]["D"], history[-1]["D"]
    assert all(last[layer] <= 0.5 * first[layer] for layer in layers), (first, last)
    small = trsp.remove_layers(model, layers)
    before_cut, after_cut = mean_loss(model, evaluation), mean_loss(small, evaluation)  # all layers on, no gates
    assert after_cut - before_cut <= 0.25 * jump, (dense, jump, before_cut, after_cut)
    assert after_cut - dense <= 0.6 * jump, (dense, jump, before_cut, after_cut)
