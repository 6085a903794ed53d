"""Removing layers on disk against cp, and against loading and saving with transformers.

python bench/bench_surgery.py [--gigabytes 2] [--folder DIR] [--xfs] [--json FILE]

All arms run in turn; every arm ends with its data on the disk (fsync). --xfs mounts a new XFS file system from a file
in --folder (root and mkfs.xfs needed), where extents are shared instead of copied.
"""

import argparse
import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from trsp_fast.models.disk_removal import remove_layers_on_disk
from trsp_fast.models.removal import remove_layers

LAYERS, REMOVED = 16, [3, 7, 8, 12]
HIDDEN, VOCABULARY = 2048, 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint, about")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--xfs", action="store_true", help="on an XFS file system in a loop device")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, place(Path(folder), arguments) as work:
        source = make_checkpoint(work / "source", arguments.gigabytes)
        kept = check(source, work / "checked")
        arms = {
            "on disk": lambda to: remove_layers_on_disk(source, REMOVED, to),
            "cp + sync": copier(work / "kept", kept),
            "load + save": lambda to: load_and_save(source, to),
        }
        seconds = in_turn(arms, work / "result", arguments.rounds)
        done = remove_layers_on_disk(source, REMOVED, work / "last")
    rows = [{"arm": name, "seconds": sorted(values)} for name, values in seconds.items()]
    content = {
        "machine": measure.machine("cpu"),
        "file_system": "xfs on a loop device" if arguments.xfs else "as found",
        "kept_bytes": kept,
        "shared_bytes": done.shared,
        "copied_bytes": done.copied,
        "rows": rows,
    }
    ours = measure.Timing.of(seconds["on disk"]).median
    print(f"{kept:,} bytes stay; {done.shared:,} shared, {done.copied:,} copied")
    for name, values in seconds.items():
        timing = measure.Timing.of(values)
        print(
            f"{name:12} {timing.median:8.3f} s ({timing.p20:.3f} - {timing.p80:.3f})"
            f"  {kept / timing.median / 1e6:8.0f} MB/s  {timing.median / ours:6.2f} x the time of ours"
        )
    if arguments.json:
        measure.write(arguments.json, content)


@contextlib.contextmanager
def place(folder: Path, arguments: argparse.Namespace) -> Iterator[Path]:
    """Where to work: the folder itself, or an XFS file system mounted in it."""
    if not arguments.xfs:
        yield folder
        return
    image, mount = folder / "xfs.img", folder / "xfs"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(int(arguments.gigabytes * 5e9) + (400 << 20))
    for command in (["mkfs.xfs", "-q", "-m", "reflink=1", image], ["mount", "-o", "loop", image, mount]):
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"--xfs: {command[0]} failed; it needs root, loop devices and the package xfsprogs.")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def make_checkpoint(folder: Path, gigabytes: float) -> Path:
    """A random bf16 Llama of about this size, in shards of 1 GB."""
    per_layer = (gigabytes * 5e8 - VOCABULARY * HIDDEN) / LAYERS - 4 * HIDDEN * HIDDEN
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=max(64, int(per_layer / (3 * HIDDEN))), num_hidden_layers=LAYERS,
        num_attention_heads=16, vocab_size=VOCABULARY, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    torch.set_default_dtype(torch.float32)
    return folder


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                found[name] = hashlib.blake2b(file.get_tensor(name).view(torch.uint8).numpy()).hexdigest()
    return found


def check(source: Path, to: Path) -> int:
    """Bytes that stay; ends the bench where a tensor is not the source's."""
    remove_layers_on_disk(source, REMOVED, to)
    stay = [layer for layer in range(LAYERS) if layer not in REMOVED]
    before, after = digests(source), digests(to)
    for name, digest in after.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(stay[int(parts[2])])
        if before[".".join(parts)] != digest:
            sys.exit(f"tensor {name} of the result is not the source's: nothing is timed.")
    if len(after) != len(before) * len(stay) // LAYERS and len(before) - len(after) != 9 * len(REMOVED):
        sys.exit(f"the result has {len(after)} tensors of {len(before)}: nothing is timed.")
    size = sum(path.stat().st_size for path in to.glob("*.safetensors"))
    shutil.rmtree(to)
    return size


def copier(file: Path, size: int) -> Callable[[Path], None]:
    """cp of one file with as many bytes as stay, and sync of the copy."""
    with file.open("wb") as target:
        block = torch.randint(0, 255, (1 << 24,), dtype=torch.uint8).numpy().tobytes()
        for begin in range(0, size, len(block)):
            target.write(block[: size - begin])

    def copy(to: Path) -> None:
        to.mkdir()
        # never: what a share costs is the other arm's figure
        subprocess.run(["cp", "--reflink=never", file, to / "copy"], check=True)
        subprocess.run(["sync", to / "copy"], check=True)

    return copy


def load_and_save(source: Path, to: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    remove_layers(model, REMOVED).save_pretrained(to)
    for path in to.iterdir():
        subprocess.run(["sync", path], check=True)


def in_turn(arms: dict[str, Callable[[Path], Any]], to: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round; nothing dirty is left between them."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            # Twice, the second counts: a virtual machine gives freed memory back to its host, and whoever comes after
            # another arm would pay for getting it again (1.6 instead of 0.65 s were seen).
            for timed in (False, True):
                subprocess.run(["sync"], check=True)
                start = time.perf_counter()
                arm(to)
                if timed:
                    seconds[name].append(time.perf_counter() - start)
                shutil.rmtree(to)
    return seconds


if __name__ == "__main__":
    main()
