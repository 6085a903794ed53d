"""The streamed proof: the verdicts of the one in memory, and no more memory than a layer needs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM
from zoo import DEFAULT_SETS, SETS, ZOO, build, padded

from trsp_fast.errors import CheckFailed, UserError
from trsp_fast.models.disk_removal import remove_layers_on_disk
from trsp_fast.models.removal import remove_layers
from trsp_fast.models.streamed_model import StreamedModel
from trsp_fast.models.streamed_verify import free_memory, needs_streaming, verify_streamed
from trsp_fast.models.tensor_names import cut_names
from trsp_fast.models.tensor_stream import Pieces, SpreadTensor, open_tensors, side_by_side
from trsp_fast.models.verify import require, verify_checkpoints

pytest.importorskip("trsp_fast._surgery", reason="trsp_fast was installed without its C++ extensions")

WEIGHTS = "model.safetensors"
# A plain one, converted experts, tuples between layers.
QUICK = ["llama", "mixtral", "gpt2"]
FAMILIES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ZOO if name not in ("rwkv",)
]


def failed(checks):
    return {check.name for check in checks if not check.passed}


def made(name):
    try:
        return build(name)
    except AttributeError as error:
        pytest.skip(f"this transformers has no {error.name or name}")


@pytest.fixture
def pair(tmp_path):
    """A source of six layers and the checkpoint without layers 1 and 4."""
    tiny_llama().save_pretrained(tmp_path / "src")
    remove_layers_on_disk(tmp_path / "src", [1, 4], tmp_path / "out")
    return tmp_path / "src", tmp_path / "out"


def change(folder, edit):
    """Rewrite a checkpoint's only weight file after `edit` of its tensors."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


# ---- it holds where it should, for every family


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_proven_layer_by_layer(name, tmp_path):
    removed = SETS.get(name, DEFAULT_SETS)[1]
    model = made(name)
    model.save_pretrained(tmp_path / "src", max_shard_size="100KB")
    small = remove_layers(model, removed)
    small.save_pretrained(tmp_path / "out")
    checks = verify_streamed(tmp_path / "src", tmp_path / "out", removed, trained=False)
    require(checks)
    assert {check.name for check in verify_checkpoints(tmp_path / "src", tmp_path / "out", removed, trained=False)} <= {
        check.name for check in checks
    }
    for parameter in small.parameters():
        parameter.data.mul_(1.03)
    small.save_pretrained(tmp_path / "trained")
    require(verify_streamed(tmp_path / "src", tmp_path / "trained", removed, trained=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_streamed_model_computes_what_transformers_does(name, tmp_path):
    """Rotary frequencies, masks and the like are in no file: they must be the ones of a model that was loaded."""
    made(name).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    fields = model.config.to_dict()
    with open_tensors(tmp_path) as tensors, torch.no_grad():
        streamed = StreamedModel(AutoConfig.from_pretrained(tmp_path), tensors, cut_names(tensors, fields, [0]).path)
        assert not streamed.problems
        held = []
        streamed.stack.layers[5].register_forward_hook(lambda *_: held.append(real(streamed.stack.layers)))
        with streamed.running() as running:
            got = running(**padded(), use_cache=False).logits
            assert not any(real(streamed.stack.layers))
        assert not any(parameter.device.type != "meta" for parameter in streamed.model.parameters())
    kept = padded()["attention_mask"].bool()
    # Files are mapped at any byte, tensors read to lie at 64: other paths of the CPU's code, and their rounding.
    torch.testing.assert_close(got[kept], model(**padded(), use_cache=False).logits[kept], rtol=1e-4, atol=1e-4)
    assert held == [[False] * 5 + [True] + [False] * 2]


def real(layers):
    return [any(parameter.device.type != "meta" for parameter in layer.parameters()) for layer in layers]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"max_position_embeddings": 8}], ids=str)
def test_ties_and_short_contexts(changes, tmp_path):
    tiny_llama(**changes).save_pretrained(tmp_path / "src")
    remove_layers_on_disk(tmp_path / "src", [0, 5], tmp_path / "out")
    require(verify_streamed(tmp_path / "src", tmp_path / "out", [0, 5], trained=False))


def test_a_source_that_stores_more_than_transformers_uses(tmp_path):
    """Both of two tied tensors, and old buffers: the pruned checkpoint may lack them, but nothing else."""
    model = tiny_llama()
    model.save_pretrained(tmp_path / "src")
    remove_layers(model, [2]).save_pretrained(tmp_path / "out")

    def more(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    change(tmp_path / "src", more)
    require(verify_streamed(tmp_path / "src", tmp_path / "out", [2], trained=False))
    change(tmp_path / "out", lambda tensors: tensors["model.embed_tokens.weight"].mul_(1.1))
    require(verify_streamed(tmp_path / "src", tmp_path / "out", [2], trained=True))
    change(tmp_path / "src", lambda tensors: tensors["lm_head.weight"].add_(1))
    assert "names and shapes of all tensors" in failed(
        verify_streamed(tmp_path / "src", tmp_path / "out", [2], trained=False)
    )


# ---- negative controls


def test_one_flipped_bit_fails(pair):
    source, pruned = pair
    content = bytearray((pruned / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (pruned / WEIGHTS).write_bytes(content)
    assert "reload: every tensor byte-equal" in failed(verify_streamed(source, pruned, [1, 4], trained=False))


@pytest.mark.parametrize("claimed", [[1, 3], [0, 1]])
def test_another_layer_removed_fails(pair, claimed):
    found = failed(verify_streamed(*pair, claimed, trained=False))
    assert {"reload: every tensor byte-equal", "bypassed logits = pruned logits"} <= found
    assert "every layer descends from its own" in failed(verify_streamed(*pair, claimed, trained=True))


def test_weights_that_were_changed_fail_unless_trained(pair):
    source, pruned = pair
    change(pruned, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(1.5))
    found = failed(verify_streamed(source, pruned, [1, 4], trained=False))
    assert found == {"reload: every tensor byte-equal", "bypassed logits = pruned logits"}
    assert failed(verify_streamed(source, pruned, [1, 4], trained=True)) == set()


def test_foreign_weights_do_not_pass_as_trained(pair):
    source, pruned = pair
    change(pruned, lambda tensors: tensors["model.embed_tokens.weight"].normal_())
    assert failed(verify_streamed(source, pruned, [1, 4], trained=True)) == {"weights are near their source"}


def test_weights_that_are_not_finite_do_not_pass_as_trained(pair):
    source, pruned = pair
    change(pruned, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][0, 0].fill_(float("nan")))
    assert "weights are near their source" in failed(verify_streamed(source, pruned, [1, 4], trained=True))


@pytest.mark.parametrize(
    ("edit", "check"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "reload: no missing, unexpected"),
        (lambda tensors: tensors.update({"model.layers.4.mlp.up_proj.weight": torch.ones(2)}), "reload: no missing"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}), "names and shapes of all tensors"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_other_tensors_fail(pair, edit, check):
    source, pruned = pair
    change(pruned, edit)
    found = failed(verify_streamed(source, pruned, [1, 4], trained=False))
    assert any(name.startswith(check) for name in found), found


def test_an_incomplete_source_is_one_sentence(pair):
    source, pruned = pair
    change(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"lacks model\.layers.1\.mlp\.up_proj\.weight"):
        verify_streamed(source, pruned, [1, 4], trained=False)


@pytest.mark.parametrize("field", [{"vocab_size": 0}, {"text_config": []}], ids=str)
def test_a_configuration_that_makes_no_model_is_one_sentence(field, pair):
    source, pruned = pair
    path = pruned / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(UserError, match="cannot be loaded"):
        verify_streamed(source, pruned, [1, 4], trained=False)


@pytest.mark.parametrize("field", ["layer_types", "max_position_embeddings"])
def test_a_stale_configuration_fails(field, tmp_path):
    """layer_types of the layers before the cut instead of those that stay: as many, and of other layers."""
    model = made("gemma2")
    model.save_pretrained(tmp_path / "src")
    remove_layers(model, [0, 2]).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    stale = {"layer_types": model.config.layer_types[:6], "max_position_embeddings": 32}[field]
    assert config[field] != stale
    path.write_text(json.dumps({**config, field: stale}))
    found = failed(verify_streamed(tmp_path / "src", tmp_path / "out", [0, 2], trained=False))
    assert "configuration" in found
    assert ("bypassed logits = pruned logits" in found) == (field == "layer_types")


def test_a_list_of_the_old_length_fails(tmp_path):
    model = made("gemma2")
    model.save_pretrained(tmp_path / "src")
    remove_layers(model, [0, 2]).save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": model.config.layer_types}))
    with pytest.raises((UserError, CheckFailed)):
        require(verify_streamed(tmp_path / "src", tmp_path / "out", [0, 2], trained=False))


# ---- the parts


def test_pieces_are_compared_and_put_back(tmp_path, monkeypatch):
    """Seven rows of four pieces of three, along either dimension, in chunks that do not divide them."""
    monkeypatch.setattr("trsp_fast.models.tensor_stream.CHUNK", 30)
    whole = torch.randn(7, 12)
    short = whole.view(7, 4, 3)[:, [0, 2]].reshape(7, 6)
    shutil.copy(Path(__file__).parents[2] / "trsp_fast" / "demo_model" / "config.json", tmp_path)
    save_file({"w": whole, "s": short, "wt": whole.T.contiguous(), "st": short.T.contiguous()}, tmp_path / WEIGHTS)
    with open_tensors(tmp_path) as tensors:
        for long, cut, dimension in (("w", "s", 1), ("wt", "st", 0)):
            pieces = Pieces(dimension, [0, 2], 4)
            chunks = list(side_by_side(tensors[long], tensors[cut], pieces))
            assert torch.equal(torch.cat([a for a, _ in chunks]), torch.cat([b for _, b in chunks]))
            assert sum(len(a) for a, _ in chunks) == 42
            one = tensors[cut]
            spread = SpreadTensor(one.descriptor, one.offset, one.dtype, one.shape, pieces)
            assert spread.meta().shape == tensors[long].shape
            back = spread[...] if dimension else spread[...].T
            assert torch.equal(back.reshape(7, 4, 3)[:, [0, 2]].reshape(7, 6), short)
            assert not back.reshape(7, 4, 3)[:, [1, 3]].any()


def test_streaming_is_chosen_by_memory(pair, monkeypatch):
    assert 1 << 20 < free_memory() < 1 << 50
    assert not needs_streaming(*pair)
    monkeypatch.setattr("trsp_fast.models.streamed_verify.free_memory", lambda: 100_000)
    assert needs_streaming(*pair)


PEAK = """
import sys
from trsp_fast.models.streamed_verify import verify_streamed
from trsp_fast.models.verify import require, verify_checkpoints
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024
way, trained, warm, source, pruned = sys.argv[1:]
prove = {"streaming": verify_streamed, "memory": verify_checkpoints}[way]
require(prove(warm + "/src", warm + "/out", [1, 4], trained=False))  # imports and first-call buffers
before = peak()
require(prove(source, pruned, [3, 8, 20], trained=trained == "trained"))
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_is_that_of_a_layer(pair, tmp_path):
    """A model of 24 layers and 366 MB in fp32, 15 MB a layer: streaming takes a fraction, loading more than it."""
    tiny_llama(
        layers=24, hidden_size=512, intermediate_size=1792, vocab_size=256, num_attention_heads=8, num_key_value_heads=8
    ).save_pretrained(tmp_path / "big", max_shard_size="100MB")
    remove_layers_on_disk(tmp_path / "big", [3, 8, 20], tmp_path / "cut")
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    assert size > 350e6

    def growth(way, trained):
        arguments = [way, trained, tmp_path, tmp_path / "big", tmp_path / "cut"]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}  # every thread has buffers of its own
        done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, env=alone)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    # Measured: 32, 48 and 659 MB.
    assert growth("streaming", "untrained") < size / 4
    assert growth("streaming", "trained") < size / 3
    assert growth("memory", "untrained") > size
