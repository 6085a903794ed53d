"""Divided weights (FSDP2): the layers, losses and weights of one process, by processes none of which has the model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import scaling
import sharded
import together
import torch
from closeness import require_close
from tiny import tiny_llama

from trsp_fast.config import TRSPConfig
from trsp_fast.engine import sharding
from trsp_fast.engine.distributed import Group, started
from trsp_fast.engine.sharding import needed, parts_of
from trsp_fast.errors import UserError
from trsp_fast.models.streamed_verify import verify_streamed
from trsp_fast.models.verify import verify_checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    """What two processes found in all quick scenarios."""
    codes, results = together.together(2, sharded.everything, folder / "results", folder)
    assert codes == [0, 0]
    return results


@pytest.fixture(scope="module")
def more(folder):
    """What two processes found in the others."""
    codes, results = together.together(2, sharded.more, folder / "more", folder)
    assert codes == [0, 0]
    return results


WITHOUT_FOLD = [name for name in together.SETTINGS if name != "fold"]  # which divided weights leave out


def test_a_fold_alone_is_refused_with_divided_weights():
    with pytest.raises(UserError, match=r"transfer.fold is alone but with divided weights"):
        sharding._require_possible(TRSPConfig.from_dict({"transfer": {"fold": "alone"}}))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process finds, one window at a time as divided runs do: Adam shows in which order sums were rounded."""
    return sharded.runs(WITHOUT_FOLD, tmp_path_factory.mktemp("one"), micro_batch=1)


@pytest.mark.parametrize("name", ["default", "paper", pytest.param("sleb", marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does(request, one, folder, tmp_path, name):
    results = [result["runs"] for result in request.getfixturevalue("more" if name == "sleb" else "two")]
    for result in results:
        require_close(result[name], one[name])
    require_same_export(results, one, folder, tmp_path, name)


def require_same_export(results, one, folder, tmp_path, name):
    """Proven, by the same checks, in the same files."""
    from safetensors.torch import load_file

    report = results[0][name]["report"]
    assert report["proven"]
    assert [check["name"] for check in report["checks"]] == [check["name"] for check in one[name]["report"]["checks"]]
    assert json.dumps(results[1][name]["report"]) == json.dumps(report)
    assert report["parameters"] == one[name]["report"]["parameters"]
    assert report["weight_bytes"]["pruned"] == one[name]["report"]["weight_bytes"]["pruned"]
    found = load_file(folder / name / "model.safetensors")
    assert found.keys() == set(one[name]["written"])
    for key, weight in results[0][name]["weights"].items():
        assert torch.equal(found[key], weight)
    names = set(os.listdir(folder / name))
    assert names == set(one[name]["files"])
    ours, theirs = (json.loads(text) for text in (results[0][name]["config"], one[name]["config"]))
    assert ours == theirs
    tiny_llama().save_pretrained(tmp_path / "source")
    trained = name != "sleb"
    checks = verify_checkpoints(tmp_path / "source", folder / name, report["removed_layers"], trained=trained)
    assert all(check.passed for check in checks), checks


def test_a_process_holds_and_sends_what_docs_scaling_counts(two):
    parameters = sum(p.numel() for p in tiny_llama().parameters())
    total = scaling.transfer_bytes(parameters, parameters, compute=4)
    for result in two:
        assert not result["held"]["odd"]
        # rows do not divide evenly: 97 words
        assert result["held"]["bytes"] == pytest.approx(scaling.sharded(total, 2), rel=1e-3)
        moved = result["held"]["gathered"] + result["held"]["reduced"]
        assert moved / 2 == pytest.approx(scaling.gathered_bytes(parameters, 2, compute=4), rel=2e-3)
    assert sum(result["held"]["bytes"] for result in two) == total


def test_every_process_makes_as_many_passes(two):
    for total in range(1, 8):
        for micro_batch in (0, 1, 2):
            first, second = (result["parts"][total, micro_batch] for result in two)
            assert len(first) == len(second)
            own = [part for part in (*first, *second) if part[1]]
            assert [row for rows, _ in own for row in rows] == list(range(total))
            assert sum(weight for _, weight in own) == pytest.approx(1)
            assert all(len(rows) == 1 for rows, weight in (*first, *second) if not weight)


def test_a_failing_process_ends_the_others_with_its_reason(tmp_path):
    codes, (first, _) = together.together(2, sharded.failure, tmp_path)
    assert codes == [0, 3]
    assert first == (
        "Lost: another process of the run is gone (process 1 failed with ZeroDivisionError: a defect); give the same "
        "command with --resume to go on."
    )


def test_memory_that_runs_out_in_one_process_ends_all(tmp_path):
    codes, (first, _) = together.together(2, sharded.scarce, tmp_path)
    assert codes == [0, 2]
    assert first == (
        "process 1: there is not enough memory for one window; set data.seq_len lower, or use a device with more, or "
        "more of them."
    )


@pytest.mark.slow
def test_bf16_computes_in_bf16_and_exports_what_came(more):
    for result in more:
        found = result["bf16"]
        assert found["dtypes"] == {torch.bfloat16}
        assert found["states"] == {torch.bfloat16}
        assert found["proven"]
        assert found["loss"][-1] < found["loss"][0]


@pytest.mark.slow
def test_quick_methods_run_in_all_processes(more):
    expected = sharded.chosen("shortgpt")
    assert [result["shortgpt"] for result in more] == [expected] * 2


@pytest.mark.slow
def test_experts_are_written_as_transformers_writes_them(more, folder):
    from safetensors import safe_open

    assert more[0]["experts"]["report"]["proven"]
    with safe_open(folder / "experts" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert any(".experts.1.w1.weight" in name for name in names), sorted(names)[:20]


def test_what_does_not_work_is_refused(two):
    for result in two:
        assert "run.compile is True but divided weights" in result["refused"]["compile"]
        assert "transfer.optimizer is adamw8bit but divided weights" in result["refused"]["adamw8bit"]
        assert "weight of several layers" in result["refused"]["shared"]


def test_who_holds_one_copy():
    assert parts_of(64, 8, needed=700.0, free=200.0) == 8  # a node can: HSDP
    assert parts_of(64, 8, needed=1400.0, free=80.0) == 64
    assert parts_of(8, 8, needed=1.0, free=80.0) == 8
    assert parts_of(6, 4, needed=1.0, free=80.0) == 6  # nodes of different sizes
    assert parts_of(4, 1, needed=1.0, free=80.0) == 4


def test_auto_divides_what_a_gpu_cannot_hold(monkeypatch):
    class Processes(sharding.Replicas):
        def __init__(self):
            self.device, self.size = torch.device("cuda", 0), 2

        def lowest(self, number):
            return number

        def highest(self, *numbers):
            return list(numbers)

    made = []
    monkeypatch.setattr(sharding, "Shards", lambda processes, parts: made.append(parts) or "divided")
    model = tiny_llama()
    config = TRSPConfig.from_dict({"num_layers": 1})
    size = needed(model, config)
    assert size == 18 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(sharding, "free_memory", lambda _device: size / sharding.ROOM * 1.01)
    assert isinstance(sharding.divided(Processes(), model, config), Processes)
    monkeypatch.setattr(sharding, "free_memory", lambda _device: size / sharding.ROOM * 0.99)
    assert sharding.divided(Processes(), model, config) == "divided"
    assert made == [2]
    ddp = TRSPConfig.from_dict({"num_layers": 1, "run": {"parallel": "ddp"}})
    assert isinstance(sharding.divided(Processes(), model, ddp), Processes)
    assert sharding.divided(alone := Group(), model, config) is alone


def test_fsdp_needs_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config = TRSPConfig.from_dict({"run": {"parallel": "fsdp"}})
    with pytest.raises(UserError, match="parallel is fsdp but torchrun has started no"), started(config):
        pass


def saving(kind: str) -> dict:
    return {"run": {"save_every": 1, "parallel": kind}}


def resumed(tmp_path: Path, one, first, second, name="default", stage="transfer"):
    """`first` and `second`: how many processes of which kind; the last process dies in the middle of a stage."""
    out, at = tmp_path / "out", 4 if name == "default" or stage == "select" else 2
    size, kind = first
    arguments = (out, name, saving(kind), (size - 1, stage, at))
    codes, results = together.together(size, sharded.run_into, tmp_path / "first", *arguments)
    assert codes[-1] == -signal.SIGKILL
    assert codes[:-1] == [0] * (size - 1)
    for result in results[:-1]:
        assert result["error"] == (
            "Lost: another process of the run is gone (its connection closed); give the same command with --resume to "
            "go on."
        )
    assert not out.exists()
    size, kind = second
    codes, results = together.together(size, sharded.run_into, tmp_path / "second", out, name, saving(kind))
    assert codes == [0] * size
    for result in results:
        assert result["error"] is None
        require_close(result["outcome"], one[name])
    events = [json.loads(line) for line in (out / ".trsp" / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "resumed"]
    assert (event["stage"], event["step"]) == (stage, at % 3 if stage == "select" else at)  # 3 steps a round
    assert sorted(os.listdir(tmp_path)) == ["first", "out", "second"]
    return results


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_others_go_on(tmp_path, one):
    results = resumed(tmp_path, one, (2, "fsdp"), (2, "fsdp"))
    codes, whole = together.together(
        2, sharded.run_into, tmp_path / "third", tmp_path / "undisturbed", "default", saving("fsdp")
    )
    assert codes == [0, 0]
    weights = whole[0]["outcome"]["weights"]
    assert all(torch.equal(weights[name], w) for name, w in results[0]["outcome"]["weights"].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ((2, "fsdp"), (3, "fsdp"), "default"),
        ((4, "fsdp"), (2, "fsdp"), "paper"),  # stage 1 has trained the weights that stage 2 began with
        ((2, "fsdp"), (1, "auto"), "default"),
        ((2, "fsdp"), (2, "ddp"), "paper"),
        ((2, "ddp"), (2, "fsdp"), "default"),
    ],
    ids=str,
)
def test_a_state_is_cut_anew_for_other_processes(tmp_path, one, first, second, name):
    resumed(tmp_path, one, first, second, name)


@pytest.mark.slow
def test_stage_1_goes_on_with_weights_in_training(tmp_path, one):
    resumed(tmp_path, one, (2, "fsdp"), (3, "fsdp"), "paper", stage="select")


@pytest.mark.slow
def test_four_processes_do_what_one_does(tmp_path, one):
    codes, results = together.together(4, sharded.runs, tmp_path / "results", WITHOUT_FOLD, tmp_path)
    assert codes == [0] * 4
    for result in results:
        for name, want in one.items():
            require_close(result[name], want)
            assert result[name]["report"]["proven"]


@pytest.mark.slow
def test_two_nodes_of_two_processes_hold_a_copy_each(tmp_path, one):
    codes, results = together.together(4, sharded.nodes, tmp_path / "results", 2, ["default", "paper"], tmp_path)
    assert codes == [0] * 4
    parameters = sum(p.numel() for p in tiny_llama().parameters())
    for result in results:
        assert result["copies"] == 2
        assert result["held"] == pytest.approx(4 * parameters / 2, rel=0.02)
        for name in ("default", "paper"):
            require_close(result["runs"][name], one[name])
            assert result["runs"][name]["report"]["proven"]


@pytest.mark.slow
def test_torchrun_divides_and_writes_one_proven_checkpoint(tmp_path):
    from safetensors.torch import save_file

    tiny_llama().save_pretrained(tmp_path / "model")
    windows = torch.randint(0, 97, (20, 16), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": windows}, tmp_path / "tokens.safetensors")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    prune = ["-m", "trsp_fast", "prune", tmp_path / "model", "--data", tmp_path / "tokens.safetensors"]
    amount = ["--out", tmp_path / "out", "--num-layers", "1", "--set", "data.batch=5", "--parallel", "fsdp", "--json"]
    done = subprocess.run([*torchrun, *prune, *amount], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["proven"]
    assert report["run"]["weights"] == "divided"
    checks = verify_streamed(tmp_path / "model", tmp_path / "out", report["removed_layers"], trained=True)
    assert all(check.passed for check in checks), checks
    assert report["speed"] == {}
    assert "tokens/s" not in (tmp_path / "out" / "report.html").read_text()
