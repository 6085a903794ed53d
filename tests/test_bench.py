"""The instruments in bench/: they refuse wrong results, merge honestly, and the README shows what they wrote."""

import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import bench_gated_residual
import bench_step
import op_cases
import plain_trsp
import pytest
import readme_table
import step_arms
import step_figures
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"


def run(script, *arguments, **environment):
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)


def test_readme_is_in_step_with_the_results():
    done = run("readme_table.py", "--check")
    assert done.returncode == 0, done.stderr


def test_bench_measures_and_writes_every_row(tmp_path):
    file = tmp_path / "found.json"
    done = run(
        "bench_gated_residual.py", "--device", "cpu", "--sizes", "16x64", "--seconds", "0.01", "--processes", "2",
        "--providers", "eager,ours", "--json", file,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    rows = content["rows"]
    assert len(rows) == 6 * 3 * 3 * 3  # cases, dtypes, passes, providers and the copy
    assert all(row["correct"] and row["median_ms"] > 0 and row["gb_per_s"] > 0 for row in rows)
    assert {row["processes_ms"][0] > 0 and len(row["processes_ms"]) for row in rows} == {2}
    assert content["cut"] == []
    saved = {(r["case"], r["provider"]): r["saved_bytes"] for r in rows if r["dtype"] == "bf16"}
    assert saved["residual, penalty", "ours"] == 0 < saved["residual, penalty", "eager"]
    peaks = {(r["case"], r["provider"]): r["peak_bytes"] for r in rows if r["dtype"] == "bf16"}
    assert 0 < peaks["residual, penalty", "ours"] < peaks["residual, penalty", "eager"]
    assert "vs eager" in done.stdout


def test_bench_names_what_its_budget_cut(tmp_path):
    file = tmp_path / "found.json"
    done = run(
        "bench_gated_residual.py", "--device", "cpu", "--sizes", "16x64", "--seconds", "0.01", "--processes", "1",
        "--providers", "ours", "--dtypes", "bf16", "--budget", "0", "--json", file,
    )  # fmt: skip
    content = json.loads(file.read_text())
    assert content["rows"] == []
    assert "output, penalty, 16 x 64 bf16" in content["cut"]
    assert "budget was spent: 6 cases" in done.stdout


@pytest.mark.parametrize("case", ["output, penalty", "residual, penalty", "norms only", "residual, no norms"])
@pytest.mark.parametrize("spoiled", [0, 1])
def test_check_finds_a_wrong_result(case, spoiled):
    problem = op_cases.Problem.make(op_cases.CASES[case], 4096, 16, torch.float32, "cpu")
    outputs = op_cases.call("ours", problem.case)(problem.x, problem.out, problem.gate)
    assert op_cases.check(problem, outputs) is None
    spoiled = min(spoiled, sum(t is not None for t in outputs) - 1)
    wrong = [None if t is None else t.clone() for t in outputs]
    with torch.no_grad():
        wrong[spoiled].view(-1)[-1] *= 1.001
    assert "sequence 1" in op_cases.check(problem, tuple(wrong))


def test_check_finds_a_wrong_gradient(monkeypatch):
    problem = op_cases.Problem.make(op_cases.CASES["output, penalty"], 64, 16, torch.float32, "cpu")
    outputs = op_cases.call("ours", problem.case)(problem.x, problem.out, problem.gate)
    right = op_cases.Problem.backward

    def without_gate(self, given, *, again=False):
        *states, gate = right(self, given, again=again)
        return (*states, gate * (1.0 if gate.dtype == torch.float64 or not again else 1.01))

    monkeypatch.setattr(op_cases.Problem, "backward", without_gate)
    assert "gate gradient" in op_cases.check(problem, outputs)


def test_no_ratio_for_wrong_results():
    ratio = bench_gated_residual.ratio
    right, wrong = {"median_ms": 1.0, "correct": True}, {"median_ms": 2.0, "correct": False}
    assert ratio(right, right).strip() == "1.00"
    assert ratio(right, wrong).strip() == ratio(wrong, right).strip() == "wrong"
    assert ratio(right, None).strip() == ""
    figures = {"gb_per_s": 1.0, "of_copy": 0.5}
    assert "| 2.0 | - |" in readme_table.line(
        "op", "bf16", "forward",
        {"eager": {**right, "median_ms": 2.0}, "compile": wrong, "ours": {**right, **figures}},
    )  # fmt: skip


def test_merge_takes_medians_and_names_what_nobody_reached():
    about = {"tokens": 1, "hidden": 2, "dtype": "bf16", "pass": "forward", "provider": "ours", "correct": True}
    figures = ("p20_ms", "p80_ms", "gb_per_s", "of_copy")

    def row(case, value, **more):
        return about | {"case": case, "median_ms": value, "of_datasheet": None} | dict.fromkeys(figures, value) | more

    cut = ["b, 1 x 2 bf16", "c, 1 x 2 bf16"]
    runs = [
        {"machine": {}, "broken": 0, "cut": ["c, 1 x 2 bf16"], "rows": [row("a", 3.0), row("b", 1.0)]},
        {"machine": {}, "broken": 1, "cut": cut, "rows": [row("a", 1.0, correct=False)]},
        {"machine": {}, "broken": 0, "cut": cut, "rows": [row("a", 2.0), row("d", 5.0)]},
    ]
    merged = bench_gated_residual.merge(runs, 4)
    rows = {row["case"]: row for row in merged["rows"]}
    assert (rows["a"]["median_ms"], rows["a"]["processes_ms"]) == (2.0, [3.0, 1.0, 2.0])
    assert [rows[name]["processes_ms"] for name in "bd"] == [[1.0], [5.0]]
    assert rows["a"]["correct"] is False
    assert merged["cut"] == ["c, 1 x 2 bf16"]
    assert merged["broken"] == 2  # one that broke off and one that wrote nothing


def test_a_process_that_breaks_off_is_said(tmp_path, monkeypatch):
    right = op_cases.Problem.make

    def fails_later(case, tokens, *rest):
        if tokens == 7:
            raise RuntimeError("out of memory")
        return right(case, tokens, *rest)

    monkeypatch.setattr(op_cases.Problem, "make", fails_later)
    file = tmp_path / "found.json"
    options = ["--device", "cpu", "--sizes", "4x8,7x8", "--dtypes", "bf16", "--providers", "ours", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--processes", "1", "--json", str(file)])
    with pytest.raises(RuntimeError, match="out of memory"):
        bench_gated_residual.in_this_process(bench_gated_residual.parse())
    content = json.loads(file.read_text())
    assert content["broken"] == 1
    assert {row["tokens"] for row in content["rows"]} == {4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "5y"], "'5y': that is not one of the choices"),
        (["--dtypes", "bf17"], "'bf17': that is not one of the choices"),
        (["--providers", "theirs"], "not one of the choices"),
    ],
)
def test_bench_refuses_what_it_does_not_know(arguments, message):
    done = run("bench_gated_residual.py", "--device", "cpu", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_every_setting_of_the_sweep_runs(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    file = tmp_path / "sweep.json"
    done = run(
        "sweep_kernels.py", "--device", "cpu", "--sizes", "3x40", "--seconds", "0", "--json", file, TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stderr
    settings = {row["setting"] for row in json.loads(file.read_text())["rows"]}
    assert len(settings) == 11
    assert len(done.stdout.splitlines()) == len(settings)
    assert any(line.startswith(" 1.0000 of") for line in done.stdout.splitlines())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_needs_a_gpu_says_so(tmp_path):
    done = run("sweep_kernels.py")
    assert (done.returncode, done.stderr.splitlines()[-1].split(": ")[-1]) == (
        2, "a CUDA GPU is needed, and none is visible.",
    )  # fmt: skip
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    for arguments, status, message in ((["kernel"], 2, "no part 'kernel'"), (["kernels"], 1, "no CUDA GPU is visible")):
        done = subprocess.run(
            ["bash", str(BENCH / "gpu.sh"), *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == status
        assert message in done.stderr


def test_regression_suite_runs():
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    done = subprocess.run(
        [*command, "-k", "ours and bf16", str(BENCH / "regressions.py")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_the_cache_bench_checks_and_measures(tmp_path):
    file = tmp_path / "kv.json"
    done = run("bench_kv_cache.py", "--device", "cpu", "--layers", 4, "--tokens", 16, "--seconds", 0, "--json", file)
    assert done.returncode == 0, done.stderr
    rows = {(row["filled"], row["step"]): row for row in json.loads(file.read_text())["rows"]}
    assert {filled for filled, _ in rows} == {8, 16}
    assert all(rows[16, step]["gb_per_s"] > 0 for step in ("compact", "regrid", "rebuild", "copy"))


def test_the_whole_run_is_measured(tmp_path):
    file = tmp_path / "e2e.json"
    done = run("bench_e2e.py", "--device", "cpu", "--shape", "tiny", "--samples", 8, "--seq", 32, "--json", file)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert content["proven"]
    assert len(content["removed_layers"]) == 1
    assert content["weight_bytes"] > content["checkpoint_bytes"] > 0
    assert content["seconds"] > sum(content["parts"].values()) > 0


def test_both_stages_are_timed(tmp_path):
    file = tmp_path / "found.json"
    done = run(
        "bench_stages.py", "--device", "cpu", "--shape", "tiny", "--samples", 16, "--seq", 32, "--num-layers", 2,
        "--pairs", 1, "--only", "fold,cut,trsp,lm-then-cut", "--json", file, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {(row["stage"], row["name"]): row for row in json.loads(file.read_text())["rows"]}
    for judge in ("fold", "cut"):
        choice = rows["stage 1", judge]
        assert len(set(choice["layers"])) == 2
        assert choice["window_forwards"] > 16
    training = rows["stage 2", "trsp"]
    assert 0 < training["fold_seconds"] < training["seconds"] == training["runs"][0]
    usual = rows["stage 2", "lm-then-cut"]
    assert usual["ratio"] == 1
    assert "fold_seconds" not in usual
    assert training["ratio"] == pytest.approx(training["seconds"] / usual["seconds"], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "nosuch"], "--only has 'nosuch'; give some of fold, "),
        (["--pairs", "0"], "--pairs is 0; give 1 or more."),
        (["--num-layers", "9"], "9 of 5 layers"),
        (["--set", "transfer.gap_lr=0.5"], "transfer.gap_lr is 0.5"),
    ],
)
def test_what_cannot_be_timed_is_one_sentence(arguments, words):
    done = run("bench_stages.py", "--device", "cpu", "--shape", "tiny", "--samples", 8, "--seq", 32, *arguments)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_surgery_bench_checks_and_measures(tmp_path):
    file = tmp_path / "surgery.json"
    done = run("bench_surgery.py", "--gigabytes", 0.2, "--rounds", 1, "--folder", tmp_path, "--json", file)
    assert done.returncode == 0, done.stderr
    rows = {row["arm"]: row["seconds"] for row in json.loads(file.read_text())["rows"]}
    assert rows.keys() == {"on disk", "cp + sync", "load + save"}
    assert all(seconds > 0 for values in rows.values() for seconds in values)


@pytest.fixture(scope="module")
def step_plan():
    # stage 1: 2 rounds of 4 steps, 3 run; stage 2: 16 steps, 5 run
    return step_figures.Plan(16, {"select": 4, "transfer": 1}, 2, {"select": 3, "transfer": 5})


def step_run(*seconds, total=0.0):
    return step_figures.Run(None, [1.0] * len(seconds), [(wall, wall / 2) for wall in seconds], total)


def test_steps_that_were_not_run_are_counted_by_their_round(step_plan):
    assert step_plan.counted_steps("select") == [4, 4]
    assert step_plan.measured_steps("select") == [3, 3]
    assert (step_plan.counted_steps("transfer"), step_plan.measured_steps("transfer")) == ([16], [5])
    run = step_run(50.0, 2.0, 4.0, 1.0, 1.0, 9.0, total=70.0)  # 50: the preparation is not a step's time
    assert step_figures.train_seconds(run, step_plan, "select") == pytest.approx(4 * 3.0 + 4 * 1.0)
    assert step_figures.train_seconds(run, step_plan, "select", 1) == pytest.approx(8.0)  # processor time
    assert step_figures.stage_seconds(run, step_plan, "select") == pytest.approx(70 + 2 * 16 / 8)
    run = step_run(9.0, 2.0, 2.0, 5.0, 2.0, total=21.0)
    assert step_figures.stage_seconds(run, step_plan, "transfer") == pytest.approx(21 + 11 * 2.0)


def test_arms_take_turns_and_waiting_is_not_their_time(monkeypatch):
    clock = itertools.count()  # every look at the clock is a second later
    monkeypatch.setattr(step_figures.time, "perf_counter", lambda: next(clock))
    order = []

    def call(name, steps, hand_over):
        run = step_figures.Run(hand_over)
        run.start()
        for step in range(steps):
            order.append(f"{name}{step}")
            run.step_done(float(step))
        run.finish()
        return run

    runs = step_arms.in_turn({name: partial(call, name, steps) for name, steps in (("a", 2), ("b", 4), ("c", 2))})
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1", "b2", "b3"]
    assert [[wall for wall, _ in run.durations] for run in runs.values()] == [[1, 1], [1, 1, 1, 1], [1, 1]]
    assert [run.seconds for run in runs.values()] == [3, 5, 3]

    def fails(hand_over):
        hand_over()
        raise RuntimeError("an arm broke")

    with pytest.raises(RuntimeError, match="an arm broke"):
        step_arms.in_turn({"good": partial(call, "d", 3), "bad": fails})
    assert order[-3:] == ["d0", "d1", "d2"]


def test_flops_of_a_step():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # Llama 2 7B: 6.74e9 parameters, 131e6 of them the embedding
    sizes = step_figures.Matmuls.of(model)
    assert sizes == step_figures.Matmuls(4 * 4096**2 + 3 * 4096 * 11008, 32000 * 4096, 4096, 32)
    dense = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name and "embed" not in name)
    pairs = 2048 * 2049 / 2  # of tokens, of which the second sees the first
    forward = 2.0 * dense * 2048 + 32 * 2 * 2 * 4096 * pairs
    assert step_figures.step_flops(sizes, 1, 2048, 32, weights=True) == pytest.approx(3 * forward)
    # frozen: no weight gradients, nothing below the lowest gate; attention's two inputs both have a gradient
    lowest = 2.0 * sizes.layer * 2048 + 2 * 2 * 2 * 4096 * pairs
    frozen = forward + 2.0 * dense * 2048 + 2 * 32 * 2 * 2 * 4096 * pairs - lowest
    assert step_figures.step_flops(sizes, 1, 2048, 32, weights=False) == pytest.approx(frozen)
    assert 1.4 < 3 * forward / frozen < 1.55


def test_flops_of_a_stage_are_those_of_the_layers_that_are_left(step_plan):
    sizes = step_figures.Matmuls(layer=10, head=7, width=2, layers=3)
    rounds = [step_figures.step_flops(sizes, 4, 8, layers, weights=False) for layers in (3, 2)]
    assert step_figures.stage_flops(sizes, step_plan, "select", 8, weights=False) == 4 * sum(rounds)
    one = step_figures.step_flops(sizes, 1, 8, 3, weights=True)
    assert step_figures.stage_flops(sizes, step_plan, "transfer", 8, weights=True) == 16 * one


def test_no_speedup_without_agreement():
    assert step_figures.agree([5.0, 5.0004], torch.float32)
    assert not step_figures.agree([5.0, 5.002], torch.float32)
    assert step_figures.agree([5.0, 5.002], torch.bfloat16)
    assert not step_figures.agree([5.0, 5.0, float("nan")], torch.float32)
    assert step_figures.speedup([4.0, 9.0, 8.0], [2.0, 3.0, 8.0], True) == 2.0
    assert step_figures.speedup([4.0], [2.0], False) is None
    found = (("plain", True, 8), ("ours", True, 6), ("ours", False, 6), ("ours", True, None))
    rows = [{"part": "select", "arm": arm, "agree": agree, "peak_bytes": size} for arm, agree, size in found]
    bench_step.with_memory_ratios(rows)
    assert [row["memory_ratio"] for row in rows] == [1.0, 0.75, None, None]


def test_the_step_bench_sees_an_arm_that_computes_something_else(monkeypatch, tmp_path, capsys):
    """One pair on a tiny model, first as it is, then with a plain port whose loss is another."""
    monkeypatch.setattr(bench_step, "peak_of", lambda *_arguments: 1000)
    monkeypatch.setattr(bench_step, "matmul_rate", lambda *_arguments: 1e9)
    options = ["--device", "cpu", "--shapes", "tiny", "--seq", "16", "--samples", "4", "--batch", "2", "--pairs", "1"]
    file = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *options, "--steps", "1", "--json", str(file)])
    bench_step.main()
    rows = {(row["part"], row["arm"]): row for row in json.loads(file.read_text())["rows"]}
    assert rows.keys() == set(itertools.product(("select", "transfer", "whole"), ("plain", "ours")))
    assert all(row["agree"] and row["ratio"] > 0 and row["tokens_per_s"] > 0 for row in rows.values())
    assert "differ" not in capsys.readouterr().out

    right = plain_trsp._lm_loss
    monkeypatch.setattr(plain_trsp, "_lm_loss", lambda *given: 1.001 * right(*given))
    with pytest.raises(SystemExit, match="first losses differ"):
        bench_step.main()
    rows = json.loads(file.read_text())["rows"]
    assert all(row["ratio"] is row["cpu_ratio"] is row["memory_ratio"] is None for row in rows)
    assert capsys.readouterr().out.count("differ") == 3 * len(rows)


@pytest.mark.slow
def test_the_step_bench_measures_memory_in_processes_of_their_own(tmp_path, monkeypatch):
    tokens = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.randint(256, (64, 128))}, tokens)
    monkeypatch.setattr(sys, "argv", ["bench_step.py", "--device", "cpu", "--batch", "16"])
    options = bench_step.parse()
    whole, small = (bench_step.peak_of("ours", "select", {}, "tiny", tokens, options) for options.batch in (16, 4))
    logits = 16 * 128 * 256 * 4  # bytes in fp32, and their gradients again as many
    assert whole - small > logits
