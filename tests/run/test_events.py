"""The stream of events: a line each that survives a kill, and curves."""

import json

import pytest

from trsp_fast.run.events import Events, JsonLines, TensorBoard


def test_half_a_line_of_a_killed_process_goes(tmp_path):
    path = tmp_path / "events.jsonl"
    log = JsonLines(path)
    log("note", {"text": "one"})
    log.close()
    with path.open("a") as file:
        file.write('{"time": 1, "eve')
    log = JsonLines(path)
    Events(log).emit("note", text="two")
    log.close()
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["one", "two"]


def test_curves_of_both_stages(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    for step in range(2):
        board("select_step", {"round": 1, "step": step, "steps": 2, "loss": 2.0 - step, "gates": [None, 0.5]})
    board("transfer_step", {"step": 0, "steps": 4, "loss": 1.0, "D": {3: 0.25, 4: None}})
    board("note", {"text": "not a curve"})
    board.close()
    curves = EventAccumulator(str(tmp_path)).Reload()
    names = {"select/loss", "select/gates/layer 1", "transfer/loss", "transfer/D/layer 3"}
    assert set(curves.Tags()["scalars"]) == names
    assert [(e.step, e.value) for e in curves.Scalars("select/loss")] == [(2, 2.0), (3, 1.0)]
