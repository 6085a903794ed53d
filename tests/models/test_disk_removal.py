"""Removal on disk: the same tensors as in memory, shared where the disk can, and nothing half-written, ever."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM
from zoo import CORE, build

from trsp_fast.errors import UserError
from trsp_fast.models import disk_removal
from trsp_fast.models.checkpoint_files import INDEX
from trsp_fast.models.disk_removal import remove_layers_on_disk
from trsp_fast.models.removal import remove_layers

pytest.importorskip("trsp_fast._surgery", reason="trsp_fast was installed without its C++ extensions")

COMMAND = [sys.executable, "-P", "-m", "trsp_fast"]


def tensors(folder):
    return {name: t for path in sorted(Path(folder).glob("*.safetensors")) for name, t in load_file(path).items()}


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def checkpoint(folder, *, layers=3, elements=1000, dtype=np.float32, **config):
    """A folder that is a checkpoint as far as the disk is concerned: 3 tensors per layer and an embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    arrays = {"model.embed_tokens.weight": generator.integers(0, 255, elements).astype(dtype)}
    for layer in range(layers):
        for part in ("attn", "mlp", "norm"):
            arrays[f"model.layers.{layer}.{part}.weight"] = generator.integers(0, 255, elements + layer).astype(dtype)
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, **config}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


# ---- the result


@pytest.mark.parametrize("shards", [None, "40KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("removed", [[0], [1, 4, 6], [7]], ids=str)
@pytest.mark.parametrize("family", CORE)
def test_equals_removal_in_memory(family, removed, shards, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "src", **({"max_shard_size": shards} if shards else {}))
    assert (tmp_path / "src" / INDEX).exists() == bool(shards)
    remove_layers(model, removed).save_pretrained(tmp_path / "memory")
    before = digest(tmp_path / "src")
    done = remove_layers_on_disk(tmp_path / "src", removed, tmp_path / "disk")
    want, got = tensors(tmp_path / "memory"), tensors(tmp_path / "disk")
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].tobytes() == tensor.tobytes(), name
    small, info = AutoModelForCausalLM.from_pretrained(tmp_path / "disk", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    memory = AutoModelForCausalLM.from_pretrained(tmp_path / "memory").config.to_dict()
    disk = small.config.to_dict()
    assert {k: v for k, v in disk.items() if k != "_name_or_path"} == {
        k: v for k, v in memory.items() if k != "_name_or_path"
    }
    assert digest(tmp_path / "src") == before
    assert done.layers == 8 - len(removed)
    assert done.bytes == sum(p.stat().st_size for p in (tmp_path / "disk").glob("*.safetensors"))


def test_infinity_in_a_configuration_survives(tmp_path):
    src = checkpoint(tmp_path / "src")
    config = json.loads((src / "config.json").read_text()) | {"time_step_limit": [0.0, float("inf")]}
    (src / "config.json").write_text(json.dumps(config))
    remove_layers_on_disk(src, [1], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]


def test_the_decoder_is_found_among_other_stacks(tmp_path):
    src = tmp_path / "src"
    src.mkdir()
    arrays = {
        f"{path}.{layer}.w": np.full(4, layer, np.float32)
        for path in ("connector.layers", "model.language.layers", "vision.layers", "model.language.layers.0.experts")
        for layer in range(3)
    }
    save_file(arrays, src / "model.safetensors")
    text = {"model_type": "llama", "num_hidden_layers": 3}
    (src / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "text_config": text}))
    remove_layers_on_disk(src, [1], tmp_path / "out")
    left = tensors(tmp_path / "out")
    assert {name for name in left if "language.layers" in name and "experts" not in name} == {
        "model.language.layers.0.w", "model.language.layers.1.w"
    }  # fmt: skip
    assert left["model.language.layers.1.w"][0] == 2
    assert sum("connector" in name for name in left) == 3


def test_numbers_with_leading_zeros_are_no_layers(tmp_path):
    src = checkpoint(tmp_path / "src")
    arrays = {**load_file(src / "model.safetensors"), "model.layers.02.w": np.ones(3, np.float32)}
    save_file(arrays, src / "model.safetensors")
    remove_layers_on_disk(src, [1], tmp_path / "out")
    assert {"model.layers.02.w", "model.layers.1.attn.weight"} <= tensors(tmp_path / "out").keys()


def test_many_runs_need_few_files_open(sharing_disk):
    """A thousand and more runs without a whole block: no two tensors of a layer are neighbours."""
    src = sharing_disk / "src"
    src.mkdir()
    arrays = {f"model.layers.{layer}.p{part}": np.ones(30, np.float32) for part in range(700) for layer in range(3)}
    names = sorted(arrays, key=lambda name: (name.rpartition("p")[2], name))
    save_file({name: arrays[name] for name in names}, src / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 3}
    (src / "config.json").write_text(json.dumps(config))
    done = remove_layers_on_disk(src, [1], sharing_disk / "out")
    assert len(done.weight_files) <= 3
    assert len(tensors(sharing_disk / "out")) == 1400


def test_empty_shards_disappear_and_the_index_is_exact(tmp_path):
    build("llama").save_pretrained(tmp_path / "src", max_shard_size="20KB")
    shards = len(list((tmp_path / "src").glob("*.safetensors")))
    done = remove_layers_on_disk(tmp_path / "src", [2, 3, 4, 5, 6], tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert done.weight_files == files
    assert len(files) < shards
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(files)
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    sizes = [t.nbytes for t in tensors(tmp_path / "out").values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["metadata"]["total_parameters"] == sum(sizes) // 4


def test_everything_else_comes_along_except_other_weights(tmp_path):
    src = checkpoint(tmp_path / "src")
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_own.py", ".gitattributes", "sub/vocab.txt"):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_text(name)
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "model.gguf", ".git/config"):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_text("weights")
    done = remove_layers_on_disk(src, [1], tmp_path / "out")
    assert done.left_out == [".git/", "model.gguf", "original/consolidated.00.pth", "pytorch_model.bin"]
    kept = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert kept == {
        "config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "modeling_own.py",
        ".gitattributes", "sub/vocab.txt",
    }  # fmt: skip


def test_progress_ends_at_the_total(tmp_path):
    seen = []
    src = checkpoint(tmp_path / "src", elements=300_000)
    done = remove_layers_on_disk(src, [0], tmp_path / "out", progress=lambda *values: seen.append(values))
    assert seen[-1][0] == seen[-1][1] == done.shared + done.copied
    assert sorted(seen) == seen


def test_a_hub_snapshot_is_read_through_its_links(tmp_path):
    src = checkpoint(tmp_path / "plain")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in src.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    remove_layers_on_disk(snapshot, [1], tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert len(tensors(tmp_path / "out")) == 7


def test_needs_neither_torch_nor_memory(tmp_path):
    """192 MB of weights in less than 64 MB, the interpreter and the command line included."""
    src = checkpoint(tmp_path / "src", elements=4_800_000)
    code = (
        "import atexit, sys\n"
        "def tell():\n"
        "    heavy = [m for m in ('torch', 'transformers', 'numpy', 'safetensors') if m in sys.modules]\n"
        "    status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "    print(status['VmHWM'].split()[0], heavy)\n"
        "atexit.register(tell)\n"
        f"sys.argv = ['trsp-fast', 'remove', {str(src)!r}, '--layers', '1', '--out', {str(tmp_path / 'out')!r}]\n"
        "from trsp_fast.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, _, heavy = done.stdout.splitlines()[-1].partition(" ")
    assert heavy == "[]"
    assert int(peak) < 64 * 1024
    assert sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) > 130_000_000


# ---- sharing


@pytest.fixture(params=["xfs", "btrfs"])
def sharing_disk(request, tmp_path):
    """A folder on a file system that shares extents, on a loop device."""
    kind = request.param
    image, mount = tmp_path / "disk.img", tmp_path / "disk"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    steps = (
        [f"mkfs.{kind}", "-q", image],
        ["mount", "-o", "loop", image, mount],
    )
    for step in steps:
        try:
            done = subprocess.run(step, capture_output=True, text=True)
            trouble = done.stderr.strip() if done.returncode else None
        except FileNotFoundError as error:
            trouble = str(error)
        if trouble and os.environ.get("TRSP_FAST_CI"):
            pytest.fail(f"CI has to test sharing: {trouble}")
        if trouble:
            pytest.skip(f"needs {kind} on a loop device: {trouble}")
    yield mount
    subprocess.run(["umount", mount], check=True)


def blocks(path, shared_only=False):
    """Physical addresses of a file's blocks, of all or of those that other files own too: the kernel's FIEMAP."""
    fs_ioc_fiemap, extent_shared, count = 0xC020660B, 0x2000, 512
    with open(path, "rb") as file:
        request = bytearray(struct.pack("=QQLLLL", 0, 2**64 - 1, 1, 0, count, 0) + bytes(56 * count))
        fcntl.ioctl(file, fs_ioc_fiemap, request)
    mapped = struct.unpack_from("=L", request, 20)[0]
    extents = [struct.unpack_from("=QQQQQLLLL", request, 32 + 56 * i) for i in range(mapped)]
    wanted = [
        (start, length) for _, start, length, _, _, flags, *_ in extents if flags & extent_shared or not shared_only
    ]
    return {start + i for start, length in wanted for i in range(0, length, 4096)}


def test_extents_are_shared_with_the_source(sharing_disk):
    src = checkpoint(sharing_disk / "src", elements=700_001, layers=4)
    os.sync()
    done = remove_layers_on_disk(src, [1], sharing_disk / "out")
    assert done.shared > 0.98 * (done.shared + done.copied)
    want = [t.tobytes() for name, t in tensors(src).items() if not name.startswith("model.layers.1.")]
    assert sorted(want) == sorted(t.tobytes() for t in tensors(sharing_disk / "out").values())
    # every block that was reported as shared is the source's own block, said by the file system
    shared = [blocks(sharing_disk / "out" / name, shared_only=True) for name in done.weight_files]
    assert set().union(*shared) <= blocks(src / "model.safetensors")
    assert 4096 * sum(map(len, shared)) >= done.shared


def test_the_source_is_left_when_the_result_is_changed(sharing_disk):
    src = checkpoint(sharing_disk / "src", elements=100_000)
    before = digest(src)
    remove_layers_on_disk(src, [1], sharing_disk / "out")
    for path in (sharing_disk / "out").glob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(-50_000, os.SEEK_END)
            file.write(b"x" * 1000)
    assert digest(src) == before


def test_from_one_file_system_to_another(sharing_disk, tmp_path):
    src = checkpoint(tmp_path / "src", elements=200_000)
    there = remove_layers_on_disk(src, [1], sharing_disk / "out")
    back = remove_layers_on_disk(sharing_disk / "out", [1], tmp_path / "back")
    assert (there.shared, back.shared) == (0, 0)
    kept = {name: t for name, t in tensors(src).items() if "layers" not in name or ".0." in name}
    assert {name: t.tobytes() for name, t in tensors(tmp_path / "back").items()} == {
        name: t.tobytes() for name, t in kept.items()
    }


# ---- what is refused


def header(**changes):
    values = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return json.dumps({"model.layers.0.w": values})


def write_header(folder, text, data=bytes(8), length=None):
    raw = struct.pack("<Q", len(text) if length is None else length) + text.encode() + data
    (folder / "model.safetensors").write_bytes(raw)


HEADERS = {
    "length": (lambda f: write_header(f, "", b"", length=2**40), "header length: 1099511627776"),
    "no length": (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "header length"),
    "truncated": (lambda f: write_header(f, header(), b"1234"), "model.layers.0.w.*data_offsets"),
    "offsets": (lambda f: write_header(f, header(data_offsets=[8, 0])), "data_offsets"),
    "shape": (lambda f: write_header(f, header(shape=[3])), "shape"),
    "dtype": (lambda f: write_header(f, header(dtype="F4")), "dtype"),
    "hole": (lambda f: write_header(f, header(data_offsets=[4, 12]), bytes(12)), "model.layers.0.w"),
    "rest": (lambda f: write_header(f, header(), bytes(20)), "bytes"),
    "deep": (lambda f: write_header(f, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "a"),
    "twice": (lambda f: write_header(f, header()[:-1] + "," + header()[1:]), "twice"),
    "folder": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()), "not a regular file"),
    "pipe": (lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")), "not a regular file"),
}  # fmt: skip


def index_of(folder, weight_map):
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / INDEX).write_text(text)


def link(folder, name, target):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


FOLDERS = {
    "config twice": (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "config.json.*'a' stands twice"),
    "config deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json.*nested too deeply"),
    "config list": (lambda f: (f / "config.json").write_text("[]"), "config.json.*list"),
    "config gone": (lambda f: (f / "config.json").unlink(), "config.json.*cannot be read"),
    "weights gone": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights.*save_pretrained"
    ),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "PEFT adapter; merge it"),
    "index outside": (lambda f: index_of(f, {"a": "../x.safetensors"}), "'../x.safetensors'"),
    "index absolute": (lambda f: index_of(f, {"a": "/etc/passwd"}), "'/etc/passwd'"),
    "index with a zero": (lambda f: index_of(f, {"a": "a\0.safetensors"}), "is not a safetensors file of the folder"),
    "config gone again": (lambda f: (f / "config.json").unlink(), "give a complete checkpoint"),
    "index unknown": (lambda f: index_of(f, {"a": "model.safetensors"}), "'a' is not in 'model.safetensors'"),
    "index missing file": (lambda f: index_of(f, {"a": "b.safetensors"}), "b.safetensors.*cannot be read"),
    "index empty": (lambda f: index_of(f, {}), "no weight_map"),
    "index broken": (lambda f: index_of(f, "{"), "is not valid JSON"),
    "link outside": (lambda f: link(f, "tokenizer.json", "/etc/passwd"), "tokenizer.json.*outside the checkpoint"),
    "weights outside": (lambda f: link(f, "model.safetensors", "/dev/zero"), "model.safetensors.*outside"),
    "index and single": (
        lambda f: (
            shutil.copy(f / "model.safetensors", f / "b.safetensors"),
            index_of(f, {"model.embed_tokens.weight": "b.safetensors"}),
        ),
        "holds both model.safetensors, which transformers loads, and an",
    ),
    "two copies": (
        lambda f: (
            shutil.copy(f / "model.safetensors", f / "b.safetensors"),
            index_of(f, {"model.embed_tokens.weight": "model.safetensors", "x": "b.safetensors"}),
        ),
        "is in 'b.safetensors' and in 'model.safetensors'",
    ),
}  # fmt: skip
CONFIGS = {
    "encoder": ({"architectures": ["BertForMaskedLM"]}, "not a causal language model"),
    "encoder-decoder": ({"is_encoder_decoder": True}, "encoder-decoder"),
    "quantised": ({"quantization_config": {}}, "quantised weights"),
    "per-layer tensors": (
        {"model_type": "gemma3n_text", "hidden_size_per_layer_input": 4},
        "embed_tokens_per_layer.weight holds a piece",
    ),
    "unknown family": ({"model_type": "new"}, "what new derives from the numbers of its layers is not known"),
    "derived types": ({"model_type": "gemma2"}, "leaves layer_types to transformers"),
    "derived windows": ({"model_type": "qwen2", "use_sliding_window": True}, "leaves layer_types to transformers"),
    "architectures": ({"architectures": {"x": 1}}, "not a list of names"),
    "model type": ({"model_type": ["llama"]}, "not a list of names"),
    "layers without end": ({"num_hidden_layers": 10**8}, "num_hidden_layers = 100000000"),
    "other count": ({"num_hidden_layers": 4}, "0 groups of tensors for 4 layers"),
    "fewer layers": ({"num_hidden_layers": 2}, "layer model.layers.2, but the configuration names 2"),
    "dense by a word": ({"first_k_dense_replace": "3"}, "first_k_dense_replace = '3', which cannot be followed"),
    "step by a word": ({"decoder_sparse_step": "x"}, "decoder_sparse_step = 'x'"),
    "no list": ({"attn_layer_indices": 5}, "attn_layer_indices = 5"),
    "no offset": ({"model_type": "jamba", "attn_layer_period": 2}, "attn_layer_period = 2.*attn_layer_offset"),
    "sharing without types": ({"model_type": "gemma3n_text", "num_kv_shared_layers": 1}, "KeyError.*layer_types"),
    "other weights": ({"transformers_weights": "z.safetensors"}, "names its weights 'z.safetensors' itself"),
    "kernel": ({"attn_implementation": "some/kernel"}, "names code of the hub .attn_implementation = 'some/kernel'"),
    "kernel inside": ({"attn_implementation": {"": "some/kernel"}}, "names code of the hub"),
    "no count": ({"num_hidden_layers": None}, "number of layers cannot be told"),
}


def assert_refused(folder, tmp_path, message, layers=(1,), out=None):
    before = digest(folder) if folder.is_dir() else {}
    here = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=message) as error:
        remove_layers_on_disk(folder, layers, out or tmp_path / "out")
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 600
    assert sorted(os.listdir(tmp_path)) == here
    assert (digest(folder) if folder.is_dir() else {}) == before


@pytest.mark.parametrize("case", HEADERS | FOLDERS)
def test_a_hostile_checkpoint_is_one_sentence(case, tmp_path):
    spoil, message = (HEADERS | FOLDERS)[case]
    folder = checkpoint(tmp_path / "src")
    spoil(folder)
    assert_refused(folder, tmp_path, message)


@pytest.mark.parametrize("case", CONFIGS)
def test_what_cannot_be_cut_is_one_sentence(case, tmp_path):
    changes, message = CONFIGS[case]
    assert_refused(checkpoint(tmp_path / "src", **changes), tmp_path, message)


@pytest.mark.parametrize(
    ("layers", "message"),
    [([3], "3"), ([-1], "-1"), ([1, 1], "1"), ([], "layer"), ([0, 1, 2], "layer")],
)
def test_wrong_layers_are_one_sentence(layers, message, tmp_path):
    assert_refused(checkpoint(tmp_path / "src"), tmp_path, message, layers)


def test_outputs_that_are_refused(tmp_path):
    src = checkpoint(tmp_path / "src")
    assert_refused(src, tmp_path, "lies inside the checkpoint", out=src / "out")
    (tmp_path / "link").symlink_to(src)
    assert_refused(src, tmp_path, "lies inside the checkpoint", out=tmp_path / "link" / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert_refused(src, tmp_path, "is not empty", out=tmp_path / "full")
    assert_refused(tmp_path / "nowhere", tmp_path, "is not a folder")


def test_the_command_says_it_in_one_line(tmp_path):
    src = checkpoint(tmp_path / "src")
    write_header(src, header(shape=[3]))
    done = subprocess.run(
        [*COMMAND, "remove", src, "--layers", "1", "--out", tmp_path / "out"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "model.safetensors" in done.stderr
    assert "shape" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- whatever happens, nothing is half-written


def test_killed_and_run_again(tmp_path):
    src = checkpoint(tmp_path / "src", elements=3_000_000)
    before = digest(src)
    out = tmp_path / "out"
    code = (
        "import sys, time\n"
        "from trsp_fast.models.disk_removal import remove_layers_on_disk\n"
        "def slowly(done, total):\n"
        "    print('moving', flush=True)\n"
        "    time.sleep(60)\n"
        "remove_layers_on_disk(sys.argv[1], [1], sys.argv[2], progress=slowly)\n"
    )
    child = subprocess.Popen([sys.executable, "-P", "-c", code, src, out], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "moving\n"
    assert not out.exists()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not out.exists()
    assert digest(src) == before
    assert len(os.listdir(tmp_path)) == 2  # the source and what the killed run left
    remove_layers_on_disk(src, [1], out)
    assert sorted(os.listdir(tmp_path)) == ["out", "src"]
    assert len(tensors(out)) == 7


def test_a_run_at_work_is_not_taken_for_abandoned(tmp_path):
    src = checkpoint(tmp_path / "src")
    others = []

    def meanwhile(done, total):
        if not others:
            others.append(remove_layers_on_disk(src, [0], tmp_path / "out"))

    with pytest.raises(UserError, match="is not empty"):
        remove_layers_on_disk(src, [1], tmp_path / "out", progress=meanwhile)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2
    assert sorted(os.listdir(tmp_path)) == ["out", "src"]


def test_a_source_that_shrinks_meanwhile(tmp_path, monkeypatch):
    src = checkpoint(tmp_path / "src", elements=100_000)
    right = disk_removal._shared_block

    def shrink(files, stage):
        os.truncate(src / "model.safetensors", 1_000_000)
        return right(files, stage)

    monkeypatch.setattr(disk_removal, "_shared_block", shrink)
    with pytest.raises(UserError, match="ended early, at byte"):
        remove_layers_on_disk(src, [0], tmp_path / "out")
    assert os.listdir(tmp_path) == ["src"]


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    src = checkpoint(tmp_path / "src", elements=100_000)
    before = digest(src)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode and os.environ.get("TRSP_FAST_CI"):
        pytest.fail("CI has to test a full disk, and may not mount a tmpfs")
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        with pytest.raises(UserError, match="no space left: 2,800,"):
            remove_layers_on_disk(src, [0], disk / "out")
        monkeypatch.setattr(disk_removal, "_check_space", lambda stage, needed: None)
        with pytest.raises(UserError, match="no space left for"):
            remove_layers_on_disk(src, [0], disk / "out")
        assert os.listdir(disk) == []
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        remove_layers_on_disk(src, [0], disk / "out")
        assert len(tensors(disk / "out")) == 7
    finally:
        subprocess.run(["umount", disk], check=True)
    assert digest(src) == before


def test_ctrl_c_stops_the_moves(tmp_path):
    src = checkpoint(tmp_path / "src", elements=2_000_000)

    def interrupt(done, total):
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        remove_layers_on_disk(src, [0], tmp_path / "out", progress=interrupt)
    assert time.monotonic() - start < 30
    assert os.listdir(tmp_path) == ["src"]


def test_weights_stay_where_memory_maps_like_them(tmp_path):
    """Data begins at a multiple of 4,096 where it is copied, and keeps its place in the block where it is shared."""
    build("llama").save_pretrained(tmp_path / "src")
    remove_layers_on_disk(tmp_path / "src", [3], tmp_path / "out")
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        assert (8 + struct.unpack("<Q", file.read(8))[0]) % 4096 == 0
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(small(input_ids=torch.arange(5)[None]).logits).all()


@pytest.mark.parametrize("first", ["n_layer", "num_hidden_layers"])
def test_both_names_of_the_count_are_written(first, tmp_path):
    counts = dict.fromkeys([first, "n_layer", "num_hidden_layers"], 3)
    remove_layers_on_disk(checkpoint(tmp_path / "src", **counts), [1], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in counts} == dict.fromkeys(counts, 2)


def test_lists_that_are_of_no_layers_stay(tmp_path):
    lists = {"ssm_multipliers": [1, 2, 3], "mlp_multipliers": [4, 5, 6], "time_step_limit": [0, 1, 2]}
    remove_layers_on_disk(checkpoint(tmp_path / "src", **lists), [1], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in lists} == lists


def test_a_report_on_the_source_stays_behind(tmp_path):
    """It says that weights were trained, and `verify` would ask it."""
    src = checkpoint(tmp_path / "src")
    (src / "report.json").write_text('{"trained": true}')
    done = remove_layers_on_disk(src, [1], tmp_path / "out")
    assert done.left_out == ["report.json"]
    assert not (tmp_path / "out" / "report.json").exists()
