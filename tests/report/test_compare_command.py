"""The command compare: what it refuses, and when."""

import pytest
import torch
from safetensors.torch import save_file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", ""], "seeds is ''; give at least one"),
        (["--seeds", "0,0"], "seeds is '0,0'; give at least one, and each only once"),
        (["--seeds", "99999999999999999999"], "seed is 99999999999999999999"),
        (["--seeds", "0", "--ratio", "x"], "ratio is 'x'"),
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
