"""States on disk: whole or not at all, the newest that is whole counts."""

import errno
import os

import pytest
import torch
from transformers import LlamaConfig

from trsp_fast.errors import Interrupted, UserError
from trsp_fast.run.identity import fingerprint, require_same, tokens_digest
from trsp_fast.run.state import DISK_RATE, Keeper, State, StateStore, Stop


def saved(folder, count=3):
    store = StateStore(folder)
    for number in range(count):
        store.save({"number": number, "by layer": {3: 0.1}}, {"x": torch.full((5,), float(number))})
    return store


def test_the_newest_two_states_stay(tmp_path):
    values, tensors = saved(tmp_path).load()
    assert values == {"number": 2, "by layer": {3: 0.1}}
    assert torch.equal(tensors["x"], torch.full((5,), 2.0))
    assert sorted(os.listdir(tmp_path)) == [f"00000{n}.{end}" for n in (2, 3) for end in ("json", "safetensors")]


@pytest.mark.parametrize("damage", ["tensors cut", "tensors changed", "tensors gone", "values cut", "values changed"])
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, damage):
    store = saved(tmp_path)
    path = tmp_path / ("000003.json" if "values" in damage else "000003.safetensors")
    content = path.read_bytes()
    if "cut" in damage:
        path.write_bytes(content[: len(content) // 2])
    elif "changed" in damage:
        path.write_bytes(content.replace(b'\\"number\\": 2', b'\\"number\\": 3').replace(b"\x40", b"\x41"))
        assert path.read_bytes() != content
    else:
        path.unlink()
    assert store.load()[0]["number"] == 1


def test_a_damaged_state_is_not_one_of_the_two_that_are_kept(tmp_path):
    saved(tmp_path)
    (tmp_path / "000003.json").write_text("{}")
    store = StateStore(tmp_path)
    assert store.load()[0]["number"] == 1
    store.save({"number": 7}, {})
    (tmp_path / "000003.json").write_text("{}")  # the newest again
    assert store.load()[0]["number"] == 1


def test_what_a_kill_left_of_a_state_goes_and_foreign_files_stay(tmp_path):
    saved(tmp_path)
    foreign = [tmp_path / "\u00b23.json", tmp_path / "notes.json", tmp_path / "000009.json"]
    for path in foreign[:2]:
        path.write_text("[]")
    foreign[2].mkdir()
    for name in ("000001.safetensors", "000004.safetensors", "000004.partial"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "000003.json").write_text('{"content": 3}')
    store = StateStore(tmp_path)
    assert store.load()[0]["number"] == 1
    store.save({"number": 7}, {})
    assert store.load()[0]["number"] == 7
    kept = [f"00000{n}.{end}" for n in (2, 3) for end in ("json", "safetensors")]
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, *(path.name for path in foreign)])


def test_without_a_whole_state_there_is_none(tmp_path):
    store = saved(tmp_path, 1)
    (tmp_path / "000001.json").write_text("{}")
    assert store.load() is None


def test_a_full_disk_leaves_the_state_before(tmp_path, monkeypatch):
    store = saved(tmp_path)

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.save({}, {})
    assert store.load()[0]["number"] == 2
    assert not list(tmp_path.glob("*.partial"))


def test_the_keeper_saves_every_so_many_steps_and_finds_what_it_saved(tmp_path):
    keeper = Keeper(StateStore(tmp_path), every=2)
    made = []

    def make(step):
        made.append(step)
        return State("select", step, {"history": [1.5]}, {"gates": torch.tensor([float(step)])})

    keeper.base = {"weight": torch.ones(2)}
    for step in range(1, 6):
        keeper.after_step(lambda step=step: make(step), last=step == 5)
    assert made == [2, 4, 5]
    again = Keeper(StateStore(tmp_path))
    assert torch.equal(again.base["weight"], torch.ones(2))
    assert again.found("transfer") is None
    state = again.found("select")
    assert (state.step, state.values, float(state.tensors["gates"])) == (5, {"history": [1.5]}, 5.0)
    assert again.found("select") is None
    again.remember("selection", {"layers": [1]})
    assert Keeper(StateStore(tmp_path)).facts == {"selection": {"layers": [1]}}
    assert Keeper(StateStore(tmp_path)).found("select") is None


def test_a_state_that_costs_more_than_its_steps_is_not_saved(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("trsp_fast.run.state.time.monotonic", lambda: now[0])
    stop = Stop()
    keeper = Keeper(StateStore(tmp_path), stop=stop)
    second = round(DISK_RATE)  # bytes that take as long

    def saves(passed, *, last=False, seconds=1):
        made = []
        now[0] += passed
        keeper.after_step(lambda: made.append(1) or State("transfer", 1), last=last, size=seconds * second)
        return bool(made)

    assert not saves(19.0)
    assert saves(2.0)
    assert not saves(0.5, last=True)
    assert saves(0.6, last=True)
    assert not saves(0.1)
    keeper._bytes, keeper._cost = second, 0.1  # this disk is ten times as fast
    assert saves(2.1)
    keeper._bytes, keeper._cost = second, 10.0  # and this one ten times slower
    assert not saves(9.0, last=True)
    assert saves(1.5, last=True)
    stop.code = 143
    with pytest.raises(Interrupted):
        saves(0.0, seconds=1000)
    assert Keeper(StateStore(tmp_path)).found("transfer")


def test_a_wish_to_end_saves_first(tmp_path):
    stop = Stop()
    keeper = Keeper(StateStore(tmp_path), every=100, stop=stop)
    keeper.after_step(lambda: State("select", 1))
    stop.code = 143
    with pytest.raises(Interrupted) as interrupted:
        keeper.after_step(lambda: State("select", 2))
    assert interrupted.value.code == 143
    assert Keeper(StateStore(tmp_path)).found("select").step == 2
    with pytest.raises(SystemExit):
        Keeper(stop=stop).after_step(lambda: State("select", 2))


def test_the_first_difference_is_named():
    one = {"config": {"transfer": {"lr": 1e-3, "clip": 1.0}}, "model": "a"}
    require_same(one, {"model": "a", "config": {"transfer": {"clip": 1.0, "lr": 1e-3}}})
    with pytest.raises(UserError, match=r"had config.transfer.lr = 0.001, this one has 0.002"):
        require_same(one, {"config": {"transfer": {"lr": 2e-3, "clip": 2.0}}, "model": "b"})
    with pytest.raises(UserError, match="had another model;"):
        require_same(one, {**one, "model": "b"})
    for old, new, said in (
        ("a", "b", "other evaluation tokens"),
        (None, "b", "no evaluation tokens, this one has some"),
        ("a", None, "evaluation tokens, this one has none"),
    ):
        with pytest.raises(UserError, match=f"had {said};"):
            require_same({"evaluation": old}, {"evaluation": new})


@pytest.mark.parametrize("change", ["value", "order", "dtype", "name", "settings"])
def test_fingerprints_tell_models_apart(change):
    def model():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 10))

    one, other = model(), model()
    assert fingerprint(one) == fingerprint(other)
    weight = other[0].weight.data
    if change == "value":
        weight[123, 77] += 1e-6
    elif change == "order":
        weight[:] = weight.flip(0)
    elif change == "dtype":
        other = other.to(torch.bfloat16)
    elif change == "settings":
        one.config, other.config = LlamaConfig(name_or_path="a"), LlamaConfig(name_or_path="b")
        assert fingerprint(one) == fingerprint(other)
        other.config.rms_norm_eps *= 2
    else:
        other = torch.nn.Sequential(other[0], torch.nn.Identity(), other[1])
    assert fingerprint(one) != fingerprint(other)


def test_digests_tell_the_length_of_windows():
    tokens = torch.arange(12)
    assert tokens_digest(tokens.view(3, 4)) != tokens_digest(tokens.view(4, 3))
    assert tokens_digest(tokens.view(4, 3).t()) == tokens_digest(tokens.view(4, 3).t().contiguous())
