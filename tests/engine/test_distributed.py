"""Several processes do what one does: the same layers, losses and weights up to the order in which fp32 adds up."""

import json
import math
import os
import signal
import subprocess
import sys

import killing
import pytest
import scaling
import together
import torch
from closeness import require_close
from tiny import tiny_llama

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.distributed import Group, started
from trsp_fast.errors import UserError


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found in all quick scenarios."""
    codes, results = together.together(2, together.everything, tmp_path_factory.mktemp("two"))
    assert codes == [0, 0]
    return results


@pytest.fixture(scope="module")
def one():
    """What one process finds."""
    return {name: together.outcome(together.pruned(name)) for name in together.SETTINGS}


@pytest.mark.parametrize("name", together.SETTINGS)
def test_two_processes_do_what_one_does(two, one, name):
    for result in two:
        require_close(result["runs"][name], one[name])


def test_among_what_they_do_are_folded_candidates_and_a_second_look(one):
    rounds = one["default"]["rounds"]
    assert rounds[0]["folded"]
    assert "instead_of" in rounds[-1]


@pytest.mark.parametrize("name", together.SETTINGS)
def test_all_processes_have_the_same_bits(two, name):
    first, second = (result["runs"][name]["weights"] for result in two)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_every_row_is_in_one_share_and_weighs_the_same(two):
    for total in range(1, 8):
        parts = [part for result in two for part in result["exchanges"]["parts"][total]]
        assert [row for rows, _ in parts for row in rows] == list(range(total))
        assert all(weight == pytest.approx(len(rows) / total) and len(rows) <= 2 for rows, weight in parts)
    assert Group().parts(torch.arange(3), 0)[0][1] == 1.0


def test_sums_and_agreements(two):
    for rank, result in enumerate(two):
        found = result["exchanges"]
        *same, spread, whole = found["sums"]
        assert all(torch.equal(tensor, torch.full_like(tensor, 3.0)) for tensor in same)
        assert spread.tolist() == [[1.0, 1.0]] * 2 + [[2.0, 2.0]] * 3
        assert whole.tolist() == [3, 3]
        assert whole.dtype == torch.int64
        both, second, none = found["gradients"]
        assert (both.tolist(), second.tolist(), none) == ([3.0, 3.0], [1.0, 1.0], None), rank
        assert found["agreed"] == [0, {3: 0.1}, math.inf, "text", None]
        assert (found["first"], found["highest"], found["nothing"]) == (0, [1, 0, 7], None)
        values, tensors = found["shared"]
        assert values == {"by layer": {1: 2.5}}
        assert (float(tensors["x"]), tensors["y"].dtype, tensors["z"].shape) == (3.5, torch.bfloat16, (0,))


def test_a_failing_process_ends_the_others_with_its_reason(two):
    first, second = (result["failure"] for result in two)
    assert first[0] == second[0]
    assert "quality.max_perplexity_ratio allows 1e-06" in first[0]
    assert second[1] == "ZeroDivisionError: a defect"
    assert first[1] == (
        "Lost: another process of the run is gone (process 1 failed with ZeroDivisionError: a defect); give the same "
        "command with --resume to go on."
    )


def test_processes_with_other_inputs_are_refused(two):
    first, second = (result["inputs"] for result in two)
    assert first == f"process 1: {second}"
    assert "differ from those of process 0" in second


def test_a_wish_to_end_ends_all_after_the_same_step(two):
    first, second = (result["stop"] for result in two)
    assert first == second == {"code": 143, "steps": [0, 1, 2]}


def test_where_one_runs_out_of_memory_all_take_smaller_micro_batches(two, one):
    for result in two:
        assert result["memory"]["micro_batches"] == ["1"] * 14
        require_close(result["memory"]["run"], one["default"])


def test_processes_hold_the_bytes_that_docs_scaling_counts(two):
    parameters = sum(p.numel() for p in tiny_llama().parameters())
    for result in two:
        found = result["held"]["default"]
        assert found["select"] == scaling.select_bytes(parameters, compute=4)
        size, trained, tensors = found["transfer"]
        assert trained == parameters
        assert size == scaling.transfer_bytes(parameters, trained, tensors, compute=4)
        size, trained, tensors = result["held"]["paper"]["transfer"]  # a part is trained, without a teacher
        assert 0 < trained < parameters
        assert size == scaling.transfer_bytes(parameters, trained, tensors, distill=False, compute=4)


def test_a_bf16_run_holds_the_bytes_that_docs_scaling_counts():
    parameters = sum(p.numel() for p in tiny_llama().parameters())
    changes = {**together.SHORT, "dtype": "bfloat16", "transfer": {"epochs": 1, "trainable": "neighbours"}}
    _, found = together.weighed("default", changes=changes)
    assert found["select"] == scaling.select_bytes(parameters)
    size, trained, tensors = found["transfer"]
    assert 0 < trained < parameters
    assert size == scaling.transfer_bytes(parameters, trained, tensors)


def test_ddp_needs_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config = TRSPConfig.from_dict({"run": {"parallel": "ddp"}})
    with pytest.raises(UserError, match="torchrun has started no processes"), started(config):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with started(config) as group:
        assert group.size == 1


@pytest.mark.slow
def test_four_processes_do_what_one_does(tmp_path, one):
    codes, results = together.together(4, together.everything, tmp_path)
    assert codes == [0] * 4
    for result in results:
        for name, want in one.items():
            require_close(result["runs"][name], want)
        assert all(
            torch.equal(result["runs"]["default"]["weights"][name], weight)
            for name, weight in results[0]["runs"]["default"]["weights"].items()
        )


CHANGES = {"run": {"save_every": 1}}


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "size", "again"), [(1, 2, 2), (1, 2, 1), (0, 2, 2), (3, 4, 2), (0, 1, 2)])
def test_a_killed_process_ends_the_run_and_others_go_on(tmp_path, one, killed, size, again):
    out = tmp_path / "out"
    arguments = (together.run_into, tmp_path / "first", out, "default", CHANGES, (killed, 4))
    codes, results = together.together(size, *arguments)
    assert codes[killed] == -signal.SIGKILL
    for rank, (code, result) in enumerate(zip(codes, results, strict=True)):
        if rank != killed:
            assert code == 0
            assert result["error"] == (
                "Lost: another process of the run is gone (its connection closed); give the same command with "
                "--resume to go on."
            )
    assert not out.exists()
    codes, results = together.together(again, together.run_into, tmp_path / "second", out, "default", CHANGES)
    assert codes == [0] * again
    for result in results:
        require_close(result["outcome"], one["default"])
    events = [json.loads(line) for line in (out / ".trsp" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resumed"] == [4]
    assert sorted(os.listdir(tmp_path)) == ["first", "out", "second"]
    if again == size:  # the same bits as a run that nobody disturbed
        codes, whole = together.together(
            size, together.run_into, tmp_path / "third", tmp_path / "o", "default", CHANGES
        )
        weights = whole[0]["outcome"]["weights"]
        assert all(torch.equal(weights[name], w) for name, w in results[0]["outcome"]["weights"].items())


@pytest.fixture
def files(llama, tmp_path):
    from safetensors.torch import save_file

    llama.save_pretrained(tmp_path / "model")
    windows = torch.randint(0, 97, (20, 16), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": windows}, tmp_path / "tokens.safetensors")
    return tmp_path


def command(files, out, processes, *more):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"] if processes else []
    model, data = str(files / "model"), str(files / "tokens.safetensors")
    prune = ["-m", "trsp_fast", "prune", model, "--data", data, "--out", str(out), "--num-layers", "1"]
    return [sys.executable, *launcher, *prune, "--set", "data.batch=5", *more]


def run(*arguments):
    return subprocess.run(*arguments, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_torchrun_writes_one_proven_checkpoint(files, tmp_path):
    out = tmp_path / "out"
    done = run(command(files, out, 2, "--parallel", "ddp", "--json"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # once, from the first process
    assert report["proven"]
    assert report["run"]["processes"] == 2
    removed = ",".join(map(str, report["removed_layers"]))
    proof = run([sys.executable, "-m", "trsp_fast", "verify", files / "model", out, "--removed", removed])
    assert proof.returncode == 0, proof.stderr
    again = run(command(files, out, 2))
    assert again.returncode == 1  # torchrun's own
    assert again.stderr.count("trsp-fast: ") == 1
    assert "is not empty" in again.stderr


@pytest.mark.slow
def test_a_signal_to_torchrun_leaves_a_run_that_one_process_can_resume(files, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(files, out, 2, "--set", "transfer.epochs=2000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killing.wait_for_a_step(process, out)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert error.count("trsp-fast: interrupted; give the same command with --resume to go on.") == 1
    assert "Traceback" not in error.split("trsp-fast: ")[0]
    assert not out.exists()
    changed = ("--set", "transfer.epochs=1", "--resume")
    assert "had config.transfer.epochs = 2000" in run(command(files, out, 0, *changed)).stderr
    process = subprocess.Popen(
        command(files, out, 0, "--set", "transfer.epochs=2000", "--resume"), stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "going on with step" in line:
            break
    process.kill()
    process.communicate()
    assert "note: the interrupted run had 2 processes, this one has 1" in "".join(lines)
