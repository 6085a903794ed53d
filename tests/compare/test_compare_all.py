"""The full matrix of comparisons: what is joined, what is left out, and the page and tables made from it."""

import json
import subprocess
import sys
from pathlib import Path

import compare_all
import comparison_tables
import pytest
import results_page

from trsp_fast.data import standard_library

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


def test_the_page_of_results_is_in_step():
    assert results_page.PAGE.read_text() == results_page.page()
    for path in results_page.RESULTS.glob("compare_*.json"):
        values = json.loads(path.read_text())
        for plot in results_page.plots(values):
            assert (results_page.PLOTS / f"{path.stem}-{plot.name}.svg").exists()
            assert plot.name in ("quality", "seconds", "layers") or plot.name.endswith(
                f"-{results_page.quarter(values)}"
            )


def test_a_rival_that_wins_with_one_seed_is_named():
    rows = [
        {"arm": arm, "seed": seed, "removed": 2, "layers": [1, 2], "perplexity": perplexity}
        for arm, perplexities in {
            "trsp": (10, 10),
            "sleb": (11, 10),
            "laco": (11, 12),
            "cut-sleb-imitate": (9, 9),
        }.items()
        for seed, perplexity in enumerate(perplexities)
    ]
    assert comparison_tables.not_beaten(rows, 2) == ["sleb"]
    assert comparison_tables.not_beaten(rows, 3) == []


def test_rates_are_compared_on_the_arms_and_seeds_that_all_have(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_tables, "RESULTS", tmp_path)

    def write(name, rate, **perplexities):
        rows = [
            {"arm": arm.replace("_", "-"), "seed": seed, "removed": 2, "tokens": 8, "perplexity": value}
            for arm, values in perplexities.items()
            for seed, value in enumerate(values)
        ]
        content = {"config": {"transfer": {"lr": rate}}, "layers": 8, "arms": rows}
        (tmp_path / name).write_text(json.dumps(content))

    write("compare_small.json", 5e-4, trsp_even_lr=[10, 99], cut_sleb_lm=[11, 99], cut_last_lm=[5, 5])
    write("rate_small_0.001.json", 1e-3, trsp_even_lr=[9], cut_sleb_lm=[8, 7], cut_sleb_imitate=[1])
    table = comparison_tables.rates()
    assert "| small | 2 of 8 | 1 | 10.00 | 11.00 (`cut-sleb-lm`) | 9.00 | 8.00 (`cut-sleb-lm`) |" in table
    assert table.endswith("lower than every rival in 0 of 1 rows.")
    write("rate_small_0.0005.json", 5e-4, trsp_even_lr=[7], cut_sleb_lm=[12])  # another training of the model
    write("compare_other.json", 5e-4, trsp_even_lr=[3, 3], cut_sleb_lm=[4, 4], cut_last_lm=[1])
    write("rate_other_0.002.json", 2e-3, trsp_even_lr=[2, 2], cut_sleb_lm=[3, 3], cut_last_lm=[1])
    table = comparison_tables.rates()
    assert "| other | 2 of 8 | 2 | 3.00 | 4.00 (`cut-sleb-lm`) | - | - | 2.00 | 3.00 (`cut-sleb-lm`) |" in table
    assert "| small | 2 of 8 | 1 | 7.00 | 12.00 (`cut-sleb-lm`) | 9.00 | 8.00 (`cut-sleb-lm`) | - | - |" in table
    assert table.endswith("lower than every rival in 2 of 2 rows.")
    write("compare_bare.json", 5e-4, trsp=[3], cut_sleb_lm=[4])  # nothing of ours to compare
    write("rate_bare_0.002.json", 2e-3, trsp=[2], cut_sleb_lm=[3])
    assert comparison_tables.rates() == table


def test_a_choice_is_held_against_slebs_of_the_same_seed(tmp_path, monkeypatch):
    """Seed 1: 10% worse; seed 0: equal. Whole passes: 16 windows of 8 layers, then 7."""
    monkeypatch.setattr(comparison_tables, "RESULTS", tmp_path)

    def row(arm, seed, layers, perplexity, passes):
        values = {"arm": arm, "seed": seed, "removed": len(layers), "layers": layers, "perplexity": perplexity}
        return values | {"window_forwards": passes, "tokens": 0, "seconds": 1.0, "seconds_transfer": None}

    rows = [
        row("dense", 0, [], 9.0, 0),
        row("trsp-untrained", 1, [2, 5], 22.0, 40),
        row("trsp-untrained", 0, [2, 4], 12.0, 20),
        row("sleb", 0, [2, 4], 12.0, 90),
        row("sleb", 1, [2, 4], 20.0, 110),
    ]
    (tmp_path / "choice_small_unseen.json").write_text(json.dumps({"layers": 8, "arms": rows}))
    compared = {"arms": [row("cut-shortgpt-distill", 0, [1, 2], 30.0, 16)]}
    (tmp_path / "compare_small_unseen.json").write_text(json.dumps(compared))
    *_, line, _, said = comparison_tables.choices().splitlines()
    assert line == (
        "| small, unseen text | 2 of 8 | 2 | 2, 4 (other ones in 1 of 2) | 2, 4 | 17.00 (12.00 to 22.00) "
        "| 16.00 (12.00 to 20.00) | +5.0% (+0.0% to +10.0%) | 30 | 0.30 | 0.12 |"
    )
    assert said == (
        "With no seed is the direct cut more than 10.0% worse than SLEB's (small, unseen text, 2 of 8); a choice takes "
        "at most 0.12 of a SLEB's whole passes (small, unseen text, 2 of 8)."
    )


@pytest.fixture
def comparisons(tmp_path, monkeypatch):
    """Run compare_all.py with these words, over comparisons that say what was asked; seed 9 takes 2 seconds."""
    monkeypatch.setattr(compare_all, "RESULTS", tmp_path)
    monkeypatch.setattr(compare_all, "write_page", lambda: "page")
    started = []

    def compare(command, check, timeout):
        out, seeds, ratios = (command[command.index(name) + 1] for name in ("--out", "--seeds", "--ratio"))
        started.append((seeds, ratios))
        if seeds == "9" and timeout is not None and timeout < 2:
            raise subprocess.TimeoutExpired(command, timeout)
        Path(out).mkdir(parents=True)
        rows = [
            {"arm": arm, "seed": int(seed), "removed": removed, "layers": list(range(removed))}
            for seed in seeds.split(",")
            for arm, removed in [("dense", 0), *(("trsp", round(8 * float(ratio))) for ratio in ratios.split(","))]
        ]
        evidence = {f"trsp {row['removed']}": seeds for row in rows if row["removed"]}
        values = {"arms": rows, "problems": [], "model": str(tmp_path), "evidence": evidence, "layers": 8}
        values["data"] = command[command.index("--data") + 1]
        (Path(out) / "comparison.json").write_text(json.dumps(values))

    def run(*words):
        started.clear()
        more = ["--subjects", "", "--model", f"small={tmp_path}", "--out", str(tmp_path / "parts"), *words]
        monkeypatch.setattr(sys, "argv", ["compare_all.py", *more])
        with pytest.raises(SystemExit) as end:
            compare_all.main()
        run.code = end.value.code
        path = tmp_path / run.name
        return json.loads(path.read_text()) if path.exists() else None

    monkeypatch.setattr(compare_all.subprocess, "run", compare)
    run.started, run.name = started, "compare_small.json"
    return run


ROWS = [(arm, seed, removed) for seed in (0, 1, 2) for arm, removed in (("dense", 0), ("trsp", 2), ("trsp", 4))]


@pytest.mark.parametrize(
    ("jobs", "calls"),
    [("3", [(seed, ratio) for seed in "012" for ratio in ("0.25", "0.5")]), ("1", [("0,1,2", "0.25,0.5")])],
)
def test_comparisons_side_by_side_are_one_result(comparisons, jobs, calls):
    found = comparisons("--jobs", jobs, "--ratio", "0.25,0.5")
    assert sorted(comparisons.started) == calls
    assert [(row["arm"], row["seed"], row["removed"]) for row in found["arms"]] == ROWS
    assert found["evidence"] == {"trsp 2": calls[0][0]}  # of the amount that is about a quarter
    assert found["model"] == "small"
    assert found["command"].endswith(f"--subjects '' --model small=FOLDER --jobs {jobs} --ratio 0.25,0.5")


def test_unseen_text_is_what_was_held_out_of_training(comparisons, tmp_path):
    assert comparisons("--seeds", "1")["data"] == "demo"
    comparisons.name = "compare_small_unseen_32k.json"
    found = comparisons("--seeds", "1", "--unseen", "--suffix", "_32k")
    assert found["data"] == "Python sources that the model was not trained on"
    assert (tmp_path / "parts" / "unseen.txt").read_text() == "\n\n".join(standard_library("held-out"))


def test_a_rate_has_a_file_of_its_own(comparisons, tmp_path):
    comparisons.name = "rate_small_0.001.json"
    assert comparisons("--seeds", "1", "--prefix", "rate", "--set", "transfer.lr=0.001") is not None
    assert not (tmp_path / "compare_small.json").exists()


def test_comparisons_that_take_too_long_are_left_out_and_done_later(comparisons, capsys, tmp_path):
    found = comparisons("--jobs", "2", "--seeds", "1,9", "--budget", "1")
    assert {row["seed"] for row in found["arms"]} == {1}
    assert "1 of 2 comparisons are finished" in capsys.readouterr().out
    found = comparisons("--jobs", "2", "--seeds", "1,9")
    assert comparisons.started == [("9", "0.25")]
    assert {row["seed"] for row in found["arms"]} == {1, 9}
    assert list((tmp_path / "parts").glob("small-*")) == []
    assert comparisons.code == 0


@pytest.mark.parametrize("other", [{"config": {"seed": 5}}, {"data": "text.txt"}])
def test_comparisons_with_other_settings_or_data_are_not_joined(comparisons, tmp_path, other):
    comparisons("--jobs", "2", "--seeds", "1,9", "--budget", "1")
    path = next((tmp_path / "parts").parent.glob("parts/small-*/comparison.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    comparisons("--jobs", "2", "--seeds", "1,9")
    assert (
        comparisons.code == "the folder of --out holds comparisons with other settings, arms or data; give another one."
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "small"), "--model is 'small'; give a name, = and a folder that is there."),
        (("--model", "small=/nowhere"), "--model is 'small=/nowhere'; give a name"),
        (("--subjects", "stories260K", "--unseen"), "--unseen is for models of Python sources"),
        (("--subjects", "foo"), "there is no subject 'foo'; give some of demo, stories260K, or --model."),
    ],
)
def test_mistakes_in_asking_for_comparisons_are_one_sentence(comparisons, capsys, words, said):
    comparisons(*words)
    assert (comparisons.code, comparisons.started) == (2, [])
    assert said in capsys.readouterr().err


def test_a_comparison_that_fails_ends_all(comparisons, monkeypatch):
    def fails(command, check, timeout):
        raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(compare_all.subprocess, "run", fails)
    comparisons("--seeds", "1")
    assert comparisons.code.startswith("a comparison ended with 2")


def test_no_comparison_begins_after_its_budget(comparisons):
    assert comparisons("--budget", "1e-9") is None
    assert (comparisons.code, comparisons.started) == (1, [])
