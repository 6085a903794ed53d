"""The examples run as they stand, and the demo model's training reproduces."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from trsp_fast.data import corpus_digest, demo_model, standard_library

ROOT = Path(__file__).resolve().parents[1]


def example(name, *arguments, cwd):
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture
def example_here(monkeypatch, capsys):
    """What an example prints, run in this process, which has imported everything already."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


SMALL = ("--windows", 4, "--length", 32)


def figures(text, pattern):
    return [float(figure.replace(",", "")) for figure in re.findall(pattern, text)]


def test_prune_local_model(stories_folder, stories_text, tmp_path):
    result = example("prune_local_model.py", stories_folder, stories_text, "out", "--samples", 12, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "removed layers [" in result.stdout
    assert "perplexity, pruned:" in result.stdout
    assert "Once upon a time" in result.stdout
    assert (tmp_path / "out" / "report.html").exists()


def test_shrink_while_generating(tmp_path):
    result = example("shrink_while_generating.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "the cache holds 48 in" in result.stdout
    assert "bytes hold 64 tokens now" in result.stdout
    assert "identical to never having cut: True" in result.stdout


def test_own_training_loop(example_here):
    shown = example_here("own_training_loop.py", *SMALL, "--remove", 2, "--steps", 2)
    dense, cut, bypassed = figures(shown, r"(?:layers:|\]:|bypassed) ([\d.,]+\d)")
    assert cut == bypassed
    assert dense != cut
    assert shown.count(" goes: gate ") == 2


def test_ops_backend(example_here):
    shown = example_here("ops_backend.py", "--tokens", 37, "--hidden", 65, "--calls", 1, "--device", "cpu")
    differences = figures(shown, r"largest difference (\S+) of")
    assert len(differences) == 6
    assert max(differences) < 1e-5
    assert "those of the gate: True" in shown


def test_compare_methods(example_here):
    shown = example_here("compare_methods.py", *SMALL, "--num-layers", 1, "--methods", "shortgpt,last,random")
    assert len(figures(shown, r"perplexity (\S+)")) == 4
    assert re.search(r"last: perplexity \S+ without \[11\]", shown)


def test_continue_after_the_cut(example_here):
    shown = example_here("continue_after_the_cut.py", *SMALL, "--layers", "4,9", "--steps", 3)
    dense, cut, tuned = figures(shown, r"(?:dense|cut|tuned): perplexity ([\d.,]+\d)")
    assert dense < cut
    assert tuned != cut
    assert "tuning " in shown
    sizes = figures(shown, r"([\d.]+) MB")
    assert len(sizes) == 1 or sizes[1] < 0.5 * sizes[0] or "does not quantise" in shown


@pytest.mark.slow
def test_prune_with_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "prune_with_torchrun.py"), "out", *map(str, SMALL), "--num-layers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert "2 processes removed layers [" in result.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 11


@pytest.mark.slow
def test_train_small_model(tmp_path):
    sizes = ("--layers", 2, "--width", 32, "--batch", 2, "--steps", 2, "--stop-after", 2)
    result = example("train_small_model.py", "--family", "qwen3", *sizes, "--out", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert trained.config.model_type == "qwen3"
    assert trained.config.num_hidden_layers == 2


@pytest.mark.slow
def test_the_demo_prunes_3_of_12_layers_and_loads(tmp_path):
    command = [sys.executable, "-m", "trsp_fast", "demo", "--out", "out"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert "3 of 12 layers removed" in result.stdout
    assert "export proven" in result.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 9
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    perplexity = report["perplexity"]
    assert perplexity["dense"] < perplexity["pruned"] < perplexity["cut"]


@pytest.mark.slow
def test_the_first_training_steps_reproduce(tmp_path):
    """Twice to the bit here; and to what was recorded with the model, where corpus, torch and threads are the same."""
    first, second = [], []
    for losses, name, steps in ((first, "a", 20), (second, "b", 3)):  # bf16 is slow where no instruction does it
        options = ("--stop-after", steps, "--skip-evaluation", "--out", name)
        result = example("train_demo_model.py", *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        record = json.loads((tmp_path / name / "training.json").read_text())
        losses += record["first_losses"]
    assert len(first) == 20
    assert first[:3] == second
    assert first[-1] < first[0]
    recorded = json.loads((demo_model() / "training.json").read_text())
    if recorded["corpus_sha256"] == corpus_digest(standard_library("train")):
        assert first == pytest.approx(recorded["first_losses"], abs=2e-2)  # other processors round bf16 differently
