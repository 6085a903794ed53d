"""An interrupted run that is resumed as another one: one sentence, or a result that is right all the same."""

import copy
import errno
import os
import sys

import pytest
import torch
from tiny import tiny_llama

import trsp_fast as trsp
from trsp_fast import pruner
from trsp_fast.engine.memory import MemoryPlan
from trsp_fast.errors import Interrupted, UserError
from trsp_fast.run.events import Events
from trsp_fast.select import gate_learning

BASE = {
    "num_layers": 2,
    "select": {"steps_per_round": 2, "shortlist": 0},
    "transfer": {"epochs": 2},
    "data": {"batch": 4},
    "run": {"save_every": 1},
}


@pytest.fixture(autouse=True)
def no_speed_proof_and_probes(monkeypatch):
    """They take longest and are no part of what is tested."""
    rates = {"prompt_tokens_per_second": 1.0, "generated_tokens_per_second": 1.0, "parameters": 1}
    monkeypatch.setattr(pruner, "measure_speed", lambda models: dict.fromkeys(models, rates))
    monkeypatch.setattr(pruner, "verify_removal", lambda *_arguments: [])
    for stage in (sys.modules["trsp_fast.transfer"], gate_learning):
        monkeypatch.setattr(stage, "plan_memory", lambda *_arguments, **_options: MemoryPlan(4))


def tokens(seed=1, count=8):
    return torch.randint(0, 97, (count, 16), generator=torch.Generator().manual_seed(seed))


def config(**changes):
    return trsp.TRSPConfig.from_dict(
        {**BASE, **{k: BASE[k] | v if k in BASE and k != "num_layers" else v for k, v in changes.items()}}
    )


def prune(out, *, at=None, model=None, settings=None, heard=None, **options):
    """A run, interrupted at the n-th event of a kind."""
    left = [at[1] if at else 0]

    def listen(kind, values):
        if heard is not None:
            heard.append((kind, values))
        if at and kind == at[0]:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

    options = {"evaluation": tokens()[:2], "events": Events(listen)} | options
    return trsp.prune(model or tiny_llama(), tokens(), settings or config(), out=out, **options)


def interrupted(out, at=("transfer_step", 3), **options):
    with pytest.raises((Interrupted, KeyboardInterrupt)) as end:
        prune(out, at=at, **options)
    assert end.type is Interrupted  # else there is no state; pytest itself would end by a KeyboardInterrupt
    return out


@pytest.mark.parametrize(
    ("at", "settings", "message"),
    [
        (("transfer_step", 3), {"num_layers": 3}, "has chosen 2 layers already, 3 are to go now"),
        (("round", 2), {"num_layers": 1}, "has chosen 2 layers already, 1 are to go now"),
        (("select_step", 2), {"select": {"train_weights": True}}, "has no weight.model.embed_tokens.weight"),
        (("select_step", 2), {"select": {"optimizer": "adam"}}, None),  # it had no state: it begins with none
    ],
)
def test_what_a_state_cannot_become_is_one_sentence(tmp_path, at, settings, message):
    if at[0] == "round":  # the second round's choice is saved with its step
        at = ("phase", 2)
    out = interrupted(tmp_path / "out", at=at)
    if message is None:
        assert len(prune(out, settings=config(**settings), accept_changes=True, resume=True).removed_layers) == 2
        return
    with pytest.raises(UserError, match=message):
        prune(out, settings=config(**settings), accept_changes=True, resume=True)


def test_what_is_folded_is_not_folded_again(tmp_path):
    """The weights of the state are folded already; the report has it from there."""
    out, before, heard = tmp_path / "out", [], []
    interrupted(out, heard=before)
    found = prune(out, resume=True, heard=heard)
    (folded,) = [values["layers"] for kind, values in before if kind == "folded"]
    assert [kind for kind, _ in heard if kind in ("folded", "resumed")] == ["resumed"]
    assert found.report["fold"] == folded


def test_a_round_goes_on_from_its_middle_with_the_curvature_that_it_had(tmp_path):
    """A mean over the round's steps: without those before the interruption other layers may go."""
    settings = config(select={"steps_per_round": 4}, transfer={"epochs": 0})
    want = prune(tmp_path / "whole", settings=settings)
    out, heard = interrupted(tmp_path / "out", at=("select_step", 2), settings=settings), []
    found = prune(out, settings=settings, resume=True, heard=heard)
    (resumed,) = [values for kind, values in heard if kind == "resumed"]
    assert (resumed["round"], 0 < resumed["step"] < 4) == (0, True)
    assert found.report["selection"] == want.report["selection"]
    assert found.history == want.history


def test_more_weights_than_the_state_has_are_one_sentence(tmp_path):
    some = config(transfer={"trainable": "neighbours"})
    out = interrupted(tmp_path / "out", settings=some)
    with pytest.raises(UserError, match=r"has no .*; give the configuration that it had"):
        prune(out, accept_changes=True, resume=True)


@pytest.mark.parametrize("accept", [False, True])
def test_another_model_is_never_accepted(tmp_path, accept):
    out = interrupted(tmp_path / "out")
    for model in (tiny_llama(seed=5), tiny_llama(rms_norm_eps=0.1), tiny_llama(layers=8)):
        with pytest.raises(UserError, match="had another model"):
            prune(out, model=model, accept_changes=accept, resume=True)
    assert len(prune(out, resume=True).removed_layers) == 2


@pytest.mark.parametrize("train", [False, True])
def test_perplexities_are_those_of_the_data_that_is_there_now(tmp_path, train):
    settings = config(select={"train_weights": train, "weights_lr": 1e-2})
    out, other, heard = interrupted(tmp_path / "out", settings=settings), tokens(seed=9)[:3], []
    with pytest.raises(UserError, match="had other evaluation tokens"):
        prune(out, settings=settings, evaluation=other, resume=True)
    result = prune(out, settings=settings, evaluation=other, accept_changes=True, resume=True, heard=heard)
    assert result.perplexity["dense"] == trsp.perplexity(tiny_llama(), other)
    assert result.perplexity.keys() == {"dense", "cut", "transferred", "pruned"}
    assert any(kind == "note" and "had other evaluation tokens" in values["text"] for kind, values in heard)


def test_a_damaged_record_of_the_run_is_one_sentence(tmp_path):
    out = interrupted(tmp_path / "out")
    record = tmp_path / ".out.unfinished" / ".trsp" / "run.json"
    for text in ("", "[]", "{}"):
        record.write_text(text)
        with pytest.raises(UserError, match=r"run\.json is damaged"):
            prune(out, resume=True, accept_changes=True)
    record.unlink()
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        prune(out, model=tiny_llama(seed=5), resume=True)
    assert len(prune(out, restart=True).removed_layers) == 2


def test_a_record_is_whole_when_the_disk_is_full(tmp_path, monkeypatch):
    out = interrupted(tmp_path / "out")
    record = tmp_path / ".out.unfinished" / ".trsp" / "run.json"
    before = record.read_text()

    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def torn(path, *_arguments, **_options):
        path.write_bytes(b"")
        full()

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        patch.setattr("pathlib.Path.write_text", torn)
        with pytest.raises(UserError, match="no space left"):
            prune(out, resume=True)
    assert record.read_text() == before


def test_a_run_without_a_whole_state_says_that_it_begins_anew(tmp_path):
    out, heard = interrupted(tmp_path / "out"), []
    for path in (tmp_path / ".out.unfinished" / ".trsp" / "state").glob("*.safetensors"):
        path.write_bytes(b"")
    prune(out, resume=True, heard=heard)
    assert [v["text"] for k, v in heard if k == "note"] == [
        "no saved state of the interrupted run is whole, so that it begins anew."
    ]


def test_the_rounds_of_sleb_are_not_lost(tmp_path):
    settings = config(select={"method": "sleb"}, transfer={"epochs": 0})
    whole = prune(tmp_path / "whole", settings=copy.deepcopy(settings))
    out, heard = interrupted(tmp_path / "out", at=("round", 2), settings=settings), []
    result = prune(out, settings=settings, resume=True, heard=heard)
    assert [values["round"] for kind, values in heard if kind == "round"] == [1]
    assert result.report["selection"] == whole.report["selection"]


def test_a_missing_package_is_said_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    heard = []
    with pytest.raises(UserError, match="needs the package torchao"):
        prune(tmp_path / "out", settings=config(transfer={"optimizer": "adamw8bit"}), heard=heard)
    assert not heard
