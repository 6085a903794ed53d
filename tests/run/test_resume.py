"""A run that is killed at any moment goes on to the same bits, and repeats no more than it may."""

import ast
import json
from collections import Counter

import killing
import pytest

SEED = 20261125
POINTS = 25
QUICK = 5  # of them in the quick tests
EVERY = 3

SETTINGS = {
    "default": {
        "num_layers": 2,
        "select": {"steps_per_round": 4},
        "transfer": {"epochs": 3, "hold": 0.5, "lambda2": 1.0},
    },
    # Momentum and carried gates, weights trained in stage 1 and a teacher that has them, no distillation.
    "paper": {
        "preset": "paper",
        "num_layers": 2,
        "select": {"train_weights": True, "weights_lr": 1e-3, "steps_per_round": 4},
        "transfer": {"objective": "distill", "lr": 1e-3, "epochs": 3},
    },
    # Weights that are changed before the first step.
    "fold": {"num_layers": 2, "select": {"steps_per_round": 4}, "transfer": {"epochs": 3}},
}


def settings(name):
    return {**SETTINGS[name], "data": {"batch": 2}, "run": {"save_every": EVERY}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By name of the settings: the folder of a run that nobody disturbed, and how often each moment came."""
    runs = {}

    def get(name):
        if name not in runs:
            folder = tmp_path_factory.mktemp("whole")
            assert killing.prune(folder / "out", settings(name), counts=str(folder / "counts")) == 0
            runs[name] = folder / "out", Counter(ast.literal_eval((folder / "counts").read_text()))
        return runs[name]

    return get


def result(folder):
    report = json.loads((folder / "report.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    return report["removed_layers"], report["perplexity"], report["transfer"], report["selection"], weights


def steps_of(folder):
    """How often each step of each stage was done."""
    lines = (folder / ".trsp" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return Counter(
        (event["event"], event.get("round"), event["step"])
        for event in events
        if event["event"] in ("select_step", "transfer_step")
    )


def cases():
    for number in range(POINTS):
        marks = [] if number < QUICK else [pytest.mark.slow]
        yield pytest.param(("default", "paper", "fold")[number % 3], number, marks=marks)


@pytest.mark.parametrize(("name", "number"), list(cases()))
def test_a_killed_run_ends_in_the_same_bits(whole, tmp_path, name, number):
    want, counts = whole(name)
    kill = killing.kill_points(counts, SEED, POINTS)[number]
    out = tmp_path / "out"
    assert killing.prune(out, settings(name), kill=kill) == -9, f"{kill} never came"
    if not out.exists():  # else the last rename was over, and only its own leftovers were not yet cleared
        assert killing.prune(out, settings(name)) == 0
        assert not (out / ".trsp" / "state").exists()
    assert result(out) == result(want)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before, after = steps_of(want), steps_of(out)
    assert before.keys() == after.keys()
    assert sum(after.values()) - sum(before.values()) <= EVERY, kill


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bits(whole, tmp_path, name):
    want, _ = whole(name)
    out, kills = tmp_path / "out", 0
    while killing.prune(out, settings(name), kill=("event", 12)) == -9:
        kills += 1
        assert kills < 20, "it makes no progress"
    assert kills > 2
    assert result(out) == result(want)
