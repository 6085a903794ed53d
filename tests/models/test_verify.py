"""Negative controls: a verifier that passes a wrong model is the defect."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config
from zoo import build

from trsp_fast.errors import CheckFailed
from trsp_fast.models.removal import remove_layers
from trsp_fast.models.streamed_verify import verify_streamed
from trsp_fast.models.verify import require, same_bytes, verify_checkpoint, verify_checkpoints, verify_removal


def failed(checks):
    return {check.name for check in checks if not check.passed}


def cut_by_hand(model, removed, *, count=False, index=False):
    """The patch that most tools apply: shorten the ModuleList; optionally the count and the layers' own index."""
    small = copy.deepcopy(model)
    kept = [layer for i, layer in enumerate(small.model.layers) if i not in removed]
    small.model.layers = nn.ModuleList(kept)
    if count:
        small.config.num_hidden_layers = len(kept)
    if index:
        for i, layer in enumerate(kept):
            layer.self_attn.layer_idx = i
    return small


def test_the_right_model_passes(llama):
    require(verify_removal(llama, remove_layers(llama, [1, 4]), [1, 4]))


def test_a_shortened_list_alone_fails(llama):
    assert "configuration" in failed(verify_removal(llama, cut_by_hand(llama, [1]), [1]))


def test_a_shortened_list_with_its_count_fails_in_generation(llama):
    found = failed(verify_removal(llama, cut_by_hand(llama, [1], count=True), [1]))
    assert found == {"cached = uncached generation"}


def test_stale_layer_types_fail():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, use_sliding_window=True, sliding_window=4,
        max_window_layers=3, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    found = failed(verify_removal(model, cut_by_hand(model, [1], count=True, index=True), [1]))
    assert "configuration" in found


def test_cached_logits_that_are_not_finite_fail(llama):
    small = copy.deepcopy(remove_layers(llama, [1]))
    original = small.forward

    def poisoned(*args, **kwargs):
        output = original(*args, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 14:
            output.logits.fill_(float("nan"))
        return output

    small.forward = poisoned
    assert failed(verify_removal(llama, small, [1])) == {"cached = uncached generation"}


@pytest.mark.parametrize("change", [{"max_position_embeddings": 128}, {"rope_theta": 1.0}, {"eos_token_id": 5}])
def test_another_configuration_fails(llama, change):
    small = copy.deepcopy(remove_layers(llama, [1]))
    for key, value in change.items():
        setattr(small.config, key, value)
    assert "configuration" in failed(verify_removal(llama, small, [1]))


def test_another_model_fails_without_a_traceback(llama, tmp_path):
    llama.save_pretrained(tmp_path / "source")
    tiny_llama(layers=5, vocab_size=101).save_pretrained(tmp_path / "other")
    checks = verify_checkpoints(tmp_path / "source", tmp_path / "other", [2], trained=False)
    assert "names and shapes of all tensors" in failed(checks)


def test_foreign_weights_do_not_pass_as_trained(llama, tmp_path):
    llama.save_pretrained(tmp_path / "source")
    small = copy.deepcopy(remove_layers(llama, [2]))
    small.model.embed_tokens.weight.data.normal_()
    small.save_pretrained(tmp_path / "pruned")
    checks = verify_checkpoints(tmp_path / "source", tmp_path / "pruned", [2], trained=True)
    assert failed(checks) == {"weights are near their source"}


def test_the_wrong_layer_fails(llama):
    assert "bypassed logits = pruned logits" in failed(verify_removal(llama, remove_layers(llama, [2]), [3]))


def test_a_changed_weight_fails(llama):
    small = copy.deepcopy(remove_layers(llama, [2]))
    small.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    assert failed(verify_removal(llama, small, [2])) == {"bypassed logits = pruned logits"}


def test_a_lost_tie_fails(llama):
    small = copy.deepcopy(remove_layers(llama, [2]))
    small.lm_head.weight = nn.Parameter(small.lm_head.weight.detach().clone())
    assert {"tied weights", "parameter count"} <= failed(verify_removal(llama, small, [2]))


def test_a_changed_byte_on_disk_fails(llama, tmp_path):
    small = remove_layers(llama, [2])
    small.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert failed(verify_checkpoint(small, tmp_path)[0]) == {"reload: every tensor byte-equal"}


def test_a_stale_count_on_disk_fails(llama, tmp_path):
    small = remove_layers(llama, [2])
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 6}))
    assert "reload: no missing, unexpected or mismatched key" in failed(verify_checkpoint(small, tmp_path)[0])


@pytest.mark.parametrize("trained", [False, True])
def test_checkpoints_with_trained_weights_pass_only_when_that_is_said(llama, tmp_path, trained):
    llama.save_pretrained(tmp_path / "source")
    small = remove_layers(llama, [2])
    small.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    small.save_pretrained(tmp_path / "pruned")
    checks = verify_checkpoints(tmp_path / "source", tmp_path / "pruned", [2], trained=trained)
    assert failed(checks) == (
        set() if trained else {"reload: every tensor byte-equal", "bypassed logits = pruned logits"}
    )


def test_trained_checkpoints_with_another_layer_removed_fail(llama, tmp_path):
    llama.save_pretrained(tmp_path / "source")
    small = remove_layers(llama, [2])
    for parameter in small.parameters():
        parameter.data.mul_(1.02)
    small.save_pretrained(tmp_path / "pruned")
    right, wrong = (
        verify_checkpoints(tmp_path / "source", tmp_path / "pruned", [layer], trained=True) for layer in (2, 3)
    )
    assert failed(right) == set()
    assert "every layer descends from its own" in failed(wrong)


def test_checkpoints_with_another_number_of_layers_fail(llama, tmp_path):
    llama.save_pretrained(tmp_path / "source")
    remove_layers(llama, [2]).save_pretrained(tmp_path / "pruned")
    checks = verify_checkpoints(tmp_path / "source", tmp_path / "pruned", [2, 3], trained=True)
    with pytest.raises(CheckFailed, match="not proven"):
        require(checks)


def test_same_bytes_compares_bits():
    nan = torch.tensor([float("nan"), 0.0])
    assert same_bytes(nan, nan.clone())
    assert not same_bytes(nan, torch.tensor([float("nan"), -0.0]))
    assert not same_bytes(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))
    assert not same_bytes(torch.zeros(2), torch.zeros(3))


def test_trained_tensors_that_hold_a_piece_of_every_layer_are_proven(tmp_path):
    model = build("gemma4")
    model.save_pretrained(tmp_path / "source")
    small = remove_layers(model, [1, 2])
    for parameter in small.parameters():
        parameter.data.mul_(1.03)
    small.save_pretrained(tmp_path / "pruned")
    require(verify_checkpoints(tmp_path / "source", tmp_path / "pruned", [1, 2], trained=True))


PROOFS = [verify_checkpoints, verify_streamed]


@pytest.mark.parametrize("prove", PROOFS)
def test_a_narrower_dtype_in_the_configuration_fails(prove, llama, tmp_path):
    """The bytes are right, and transformers rounds them when it loads the checkpoint."""
    llama.bfloat16().save_pretrained(tmp_path / "source")
    remove_layers(llama, [2]).save_pretrained(tmp_path / "pruned")
    require(prove(tmp_path / "source", tmp_path / "pruned", [2], trained=False))
    path = tmp_path / "pruned" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))
    found = failed(prove(tmp_path / "source", tmp_path / "pruned", [2], trained=False))
    assert found == {"dtype that weights are loaded in"}


@pytest.mark.parametrize("prove", PROOFS)
def test_another_architecture_fails(prove, llama, tmp_path):
    llama.save_pretrained(tmp_path / "source")
    remove_layers(llama, [2]).save_pretrained(tmp_path / "pruned")
    path = tmp_path / "pruned" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["MistralForCausalLM"]}))
    assert failed(prove(tmp_path / "source", tmp_path / "pruned", [2], trained=False)) == {"configuration"}


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_lost_bits_fail_where_the_configuration_states_a_narrower_dtype(family, tmp_path):
    """The model's names are not the files': GPT-2's without its prefix, Mixtral's experts one by one."""
    model = build(family)
    model.save_pretrained(tmp_path / "source")
    remove_layers(model, [2]).save_pretrained(tmp_path / "pruned")
    for folder, lossy in ((tmp_path / "source", False), (tmp_path / "pruned", True)):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
        tensors = load_file(folder / "model.safetensors")
        for name in list(tensors):
            tensor = tensors.pop(name)
            rounded = lossy and (family == "gpt2" or ".experts." in name)
            tensors[name.removeprefix("transformer.")] = tensor.bfloat16().float() if rounded else tensor
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    checks = verify_checkpoints(tmp_path / "source", tmp_path / "pruned", [2], trained=False)
    assert "reload: every tensor byte-equal" in failed(checks)
