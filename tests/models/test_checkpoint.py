import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from trsp_fast.errors import UserError
from trsp_fast.models.checkpoint import align_header, load_model, save_checkpoint
from trsp_fast.models.checkpoint_files import read_config


def data_start(path):
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    return 8 + length


def test_saved_data_starts_at_a_page(llama, tmp_path):
    save_checkpoint(llama, tmp_path)
    path = tmp_path / "model.safetensors"
    assert data_start(path) % 4096 == 0
    loaded = load_model(str(tmp_path), device="cpu")
    for name, tensor in llama.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("multiple", [64, 4096])
def test_alignment_changes_nothing_but_the_header(tmp_path, multiple):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3), "b": torch.arange(5)}
    save_file(tensors, path, {"format": "pt"})
    for _ in range(2):
        align_header(path, multiple)
        assert data_start(path) % multiple == 0
        loaded = load_file(path)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert list(tmp_path.iterdir()) == [path]


def test_missing_weights_are_refused(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights \(model.layers.3.mlp.up_proj.weight"):
        load_model(str(tmp_path))


def test_other_files_of_the_folder_are_not_the_models(llama, tmp_path):
    """A variant in a wider dtype beside the weights that transformers loads."""
    llama.half().save_pretrained(tmp_path)
    other = {name: torch.full_like(tensor, 7).float() for name, tensor in llama.state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    loaded = load_model(str(tmp_path), device="cpu")
    assert all(torch.equal(tensor, llama.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("read", [read_config, load_model])
def test_weights_of_another_name_are_refused(read, llama, tmp_path):
    llama.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "z.safetensors"}))
    with pytest.raises(UserError, match=r"names its weights 'z\.safetensors' itself"):
        read(str(tmp_path))
