"""Layers that predict further tokens ahead: transformers does not load them, and a cut drops them, saying so."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import build

from trsp_fast import cli
from trsp_fast.errors import UserError
from trsp_fast.models.checkpoint import predictors_not_loaded
from trsp_fast.models.disk_removal import remove_layers_on_disk
from trsp_fast.models.families import mtp_layers, slice_config
from trsp_fast.models.removal import remove_layers
from trsp_fast.models.tensor_names import cut_names
from trsp_fast.models.verify import require, verify_checkpoint, verify_checkpoints

EXTRA = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight")


@pytest.fixture(params=["deepseek-v3", "glm4-moe"])
def source(request, tmp_path):
    """A checkpoint as its makers publish it: the prediction layer is numbered on after the last."""
    folder = tmp_path / "src"
    build(request.param).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    last = {name.replace("layers.7.", "layers.8."): t.clone() for name, t in tensors.items() if "layers.7." in name}
    tensors |= last | {f"model.layers.8.{name}": torch.ones(4) for name in EXTRA}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields = {name: value for name, value in fields.items() if name != "num_mtp_layers"}
    (folder / "config.json").write_text(json.dumps({**fields, "num_nextn_predict_layers": 1}))
    return folder


def test_on_disk_they_are_dropped(source, tmp_path):
    done = remove_layers_on_disk(source, [1, 4, 6], tmp_path / "disk")
    assert len(done.predicting) >= len(EXTRA) + 5
    assert all(name.startswith("model.layers.8.") for name in done.predicting)
    left = load_file(tmp_path / "disk" / "model.safetensors")
    assert {int(name.split(".")[2]) for name in left if name.startswith("model.layers.")} == set(range(5))
    assert json.loads((tmp_path / "disk" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    model = AutoModelForCausalLM.from_pretrained(source)
    require(verify_checkpoint(remove_layers(model, [1, 4, 6]), tmp_path / "disk")[0])
    require(verify_checkpoints(source, tmp_path / "disk", [1, 4, 6], trained=False))


def test_streaming_proves_it_too(source, tmp_path):
    from trsp_fast.models.streamed_verify import verify_streamed

    remove_layers_on_disk(source, [1, 4, 6], tmp_path / "disk")
    require(verify_streamed(source, tmp_path / "disk", [1, 4, 6], trained=False))


def test_in_memory_they_are_dropped_and_counted_as_none(source, tmp_path):
    small = remove_layers(AutoModelForCausalLM.from_pretrained(source), [1, 4, 6])
    assert mtp_layers(small.config.to_dict()) == 0
    small.save_pretrained(tmp_path / "memory")
    saved = json.loads((tmp_path / "memory" / "config.json").read_text())
    assert mtp_layers(saved) == 0
    require(verify_checkpoints(source, tmp_path / "memory", [1, 4, 6], trained=False))


@pytest.mark.parametrize("way", ["remove", "remove in memory", "prune"])
def test_the_command_says_so(source, tmp_path, monkeypatch, capsys, way):
    if way == "remove in memory":
        monkeypatch.setattr("trsp_fast.models.families.disk_obstacle", lambda _config: "a test wants it so")
    tokens = torch.randint(0, 97, (8, 16), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    options = ["--data", str(tmp_path / "tokens.safetensors"), "--set", "transfer.epochs=0"] if way == "prune" else []
    arguments = [way.split()[0], str(source), "--layers", "1,4", "--out", str(tmp_path / "out"), *options]
    monkeypatch.setattr("sys.argv", ["trsp-fast", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    assert "tensors of multi-token prediction are dropped" in captured.out + captured.err
    assert mtp_layers(json.loads((tmp_path / "out" / "config.json").read_text())) == 0


def test_a_checkpoint_without_them_gets_no_note(tmp_path):
    build("deepseek-v3").save_pretrained(tmp_path)
    assert predictors_not_loaded(str(tmp_path)) is None


# ---- the rules by themselves


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"num_nextn_predict_layers": 2}, {"num_nextn_predict_layers": 0}),
        ({"mtp_num_hidden_layers": 1}, {"mtp_num_hidden_layers": 0}),
        ({"model_type": "deepseek_v3"}, {"num_nextn_predict_layers": 0}),  # transformers takes one for granted
        ({"model_type": "deepseek_v3", "num_mtp_layers": 0}, {"num_mtp_layers": 0}),
        ({}, {}),
    ],
)
def test_the_configuration_counts_none(fields, want):
    sliced = slice_config({"model_type": "x", "num_hidden_layers": 4, **fields}, [0, 2])
    assert {name: value for name, value in sliced.items() if "nextn" in name or "mtp" in name} == want


def names(layers, *more):
    return [*(f"model.layers.{layer}.mlp.weight" for layer in range(layers)), *more]


def test_names():
    config = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    named = ["mtp.layers.0.mlp.weight", "model.mtp_norm.0.weight", "model.mtpx.weight"]
    cut = cut_names(names(4, *named), config, [0, 2])
    assert cut.new == {
        "model.layers.0.mlp.weight": "model.layers.0.mlp.weight",
        "model.layers.2.mlp.weight": "model.layers.1.mlp.weight",
        "model.mtpx.weight": "model.mtpx.weight",
    }
    assert cut.predicting == [*named[:2], "model.layers.3.mlp.weight"]


@pytest.mark.parametrize("counted", [0, 1, -5, 10**12, True, "1"])
def test_more_layers_than_counted_are_refused(counted):
    config = {"num_hidden_layers": 3, "num_nextn_predict_layers": counted}
    with pytest.raises(UserError, match=r"tensors of layer model\.layers\.\d+, but the configuration names 3 layers"):
        cut_names(names(1010 if counted == 10**12 else 5), config, [0, 2])
