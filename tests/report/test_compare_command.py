"""The command compare: what it refuses, and when."""

import json

import pytest
import torch
from safetensors.torch import save_file

from trsp_fast.report.terminal import print_table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", ""], "seeds is ''; give at least one"),
        (["--seeds", "0,0"], "seeds is '0,0'; give at least one, and each only once"),
        (["--seeds", "99999999999999999999"], "seed is 99999999999999999999"),
        (["--seeds", "0", "--ratio", "x"], "ratio is 'x'"),
        (["--set", "seed=5"], "seed is 5 in the configuration; a comparison takes --seeds"),
        (["--set", "layers=[1, 2]"], "layers is [1, 2] in the configuration; a comparison takes --seeds, and --ratio"),
    ],
)
def test_what_cannot_be_compared_is_said_before_a_model_is_loaded(run, monkeypatch, tmp_path, options, message):
    monkeypatch.setattr("trsp_fast.cli.evidence.load", lambda *_: pytest.fail("a model was loaded"))
    code, _, error = run("compare", "demo", "--arms", "last", *options, "--out", tmp_path / "out")
    assert code == 2
    assert message in error
    assert not (tmp_path / "out").exists()


def test_compare_refuses_tokens_that_the_model_does_not_have(run, tmp_path):
    save_file({"tokens": torch.full((40, 64), 5000)}, tmp_path / "t.safetensors")
    options = ("--data", tmp_path / "t.safetensors", "--num-layers", "1", "--arms", "last", "--seeds", "0")
    code, _, error = run("compare", "demo", *options, "--out", tmp_path / "out")
    assert code == 2
    assert "the data has token 5000, the model knows 0 to 2047" in error


def test_the_amount_may_come_from_the_configuration_and_options_win(run, tmp_path):
    save_file({"tokens": torch.arange(40 * 16).view(40, 16)}, tmp_path / "t.safetensors")
    for name, options, removed in (
        ("a", [], [6]),
        ("b", ["--num-layers", "1"], [1]),
        ("c", ["--num-layers", "2", "--ratio", "0.25"], [2, 3]),
    ):
        given = ["--data", tmp_path / "t.safetensors", "--arms", "last", "--seeds", "0", "--set", "ratio=0.5", "--json"]
        given += ["--set", "data.seq_len=16"]
        code, answer, error = run("compare", "demo", *given, *options, "--out", tmp_path / name)
        assert code == 0, error
        assert [row["removed"] for row in json.loads(answer)["arms"]] == [0, *removed]


def test_a_table_in_a_pipe_is_as_wide_as_its_cells(capsys):
    cells = [f"{index} of a cell with words, and with a wordthatislongerthanitscolumn" for index in range(4)]
    print_table([f"column {index}" for index in range(4)], [cells])
    assert [part.strip() for part in capsys.readouterr().out.splitlines()[2].split("│")] == cells
