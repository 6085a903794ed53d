"""Taking layers out of a checkpoint on disk: no tensor is loaded, and where the file system can, no byte is copied.

Imports neither torch nor transformers. The planning and the moving are C++ (csrc/removal_plan.h, csrc/move_ranges.h).
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsp_fast.config import checked_layers
from trsp_fast.errors import UserError
from trsp_fast.models.checkpoint_files import (
    INDEX,
    SINGLE,
    WeightFile,
    extension,
    folder_of,
    plain_file,
    read_config,
    weight_files,
)
from trsp_fast.models.families import disk_obstacle, layer_count, slice_config, text_fields
from trsp_fast.models.tensor_names import cut_names
from trsp_fast.run.output import staged_output, write_json

# Other forms of the same weights; the unpruned ones must not lie beside the pruned model.
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".npz", ".index.json",
)  # fmt: skip
REPORTS = ("report.json", "report.html")  # of prune: on how the source came to be, which is not how the result did
OPEN_FILES = 64  # of the result at a time
THREADS = 4  # enough to keep a fast disk busy; more only add seeks on a slow one


@dataclass(frozen=True)
class DiskRemoval:
    """What `remove_layers_on_disk` did.

    `shared` bytes are extents that both checkpoints now own; `predicting` are the tensors of multi-token prediction,
    which stayed behind.
    """

    out: Path
    removed: list[int]
    layers: int
    weight_files: list[str]
    left_out: list[str]
    predicting: list[str]
    bytes: int
    shared: int
    copied: int
    seconds: float


def remove_layers_on_disk(
    src: str | Path,
    layers: Iterable[int],
    dst: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> DiskRemoval:
    """Write the checkpoint `src` without `layers` to the new folder `dst`, in constant memory.

    The weights that stay move as whole ranges: shared with the source where the file system can (XFS, Btrfs), else
    copied by the kernel, else by read and write. Headers, index and config.json are written anew; all other files come
    along, except other forms of the same weights (`DiskRemoval.left_out`). `dst` appears when it is complete.

    Args:
        src: a folder with config.json and safetensors weights, in one file or with an index. It is only read.
        layers: indices to remove, each once.
        dst: does not exist or is empty, and lies outside `src`.
        progress: called about ten times a second with bytes done and bytes in all.

    Raises:
        UserError: the checkpoint is broken, hostile or of a kind that cannot be cut so, the layers are not its own, or
            the disk refuses; one sentence, and nothing is written.
    """
    start = time.perf_counter()
    folder = folder_of(src)
    if Path(os.path.realpath(dst)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"output {str(dst)!r} lies inside the checkpoint {str(src)!r}; give a folder outside it.")
    config = read_config(folder)
    _, count = layer_count(text_fields(config))
    removed = checked_layers(layers, count)
    kept = [layer for layer in range(count) if layer not in removed]
    sliced = slice_config(config, kept)
    if obstacle := disk_obstacle(config):
        raise UserError(
            f"this model cannot be cut on disk, because {obstacle}; use remove_layers in memory (the command "
            "trsp-fast remove does it by itself)."
        )
    with weight_files(folder) as files, _errors_of_disk(src):
        names = cut_names([tensor[0] for file in files for tensor in file.tensors], config, kept)
        with staged_output(dst) as stage:
            weights, moved = _move_weights(files, names.new, stage, progress)
            left_out = _bring_along(folder, stage, {file.name for file in files})
            write_json(stage / "config.json", sliced, strict=False)
            size = sum((stage / name).stat().st_size for name in weights)
    return DiskRemoval(
        out=Path(dst),
        removed=removed,
        layers=len(kept),
        weight_files=weights,
        left_out=left_out,
        predicting=names.predicting,
        bytes=size,
        shared=moved[0],
        copied=moved[1],
        seconds=time.perf_counter() - start,
    )


# ---- writing


def _move_weights(
    files: list[WeightFile], names: dict[str, str], stage: Path, progress: Callable[[int, int], None] | None
) -> tuple[list[str], tuple[int, int]]:
    """Write the weight files and their index; names of the files, bytes shared and bytes copied."""
    surgery = extension()
    block = _shared_block(files, stage)
    targets = surgery.plan([(file.header, file.data_bytes) for file in files], names, block)
    total = sum(size - len(head) for _, head, size, _, _ in targets)
    _check_space(stage, sum(r[2] for *_, ranges in targets for r in ranges if not r[3]))
    titles = [
        SINGLE if len(targets) == 1 else f"model-{i:05}-of-{len(targets):05}.safetensors"
        for i in range(1, len(targets) + 1)
    ]
    in_kernel, moved = _is_on_server(stage), (0, 0)
    for begin in range(0, len(targets), OPEN_FILES):
        group = list(zip(titles, targets, strict=True))[begin : begin + OPEN_FILES]
        with contextlib.ExitStack() as stack:
            moves = []
            for title, (source, head, size, _, ranges) in group:
                out = stack.enter_context((stage / title).open("xb", buffering=0))
                out.write(head)
                os.ftruncate(out.fileno(), size)
                moves += [(files[source].descriptor, out.fileno(), *range_) for range_ in ranges]

            def report(shared: int, copied: int, before: int = sum(moved)) -> None:
                if progress is not None:
                    progress(before + shared + copied, total)

            shared, copied = surgery.move_ranges(moves, THREADS, report, in_kernel)
            moved = (moved[0] + shared, moved[1] + copied)
    if len(titles) > 1:
        _write_index(files, names, titles, targets, stage)
    return titles, moved


def _shared_block(files: list[WeightFile], stage: Path) -> int:
    """The block size when extents can be shared between the checkpoint and the result, else 0."""
    surgery = extension()
    block = os.statvfs(stage).f_bsize
    probe = stage / ".probe"
    with probe.open("xb", buffering=0) as file:
        large = next((f for f in files if 8 + len(f.header) + f.data_bytes >= block), None)
        shares = large is not None and surgery.can_share(large.descriptor, file.fileno(), block)
    probe.unlink()
    return block if shares else 0


def _is_on_server(stage: Path) -> bool:
    """Whether the result lies on a file server, which can copy what it holds without the network."""
    device = stage.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:  # no Linux
        return False
    # fields: id, parent, major:minor, root, mount point, options, ..., "-", type, ...
    kinds = [line.split(" - ")[-1].split()[0] for line in mounts.splitlines() if line.split()[2] == wanted]
    return any(kind in ("nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "gpfs") for kind in kinds)


def _check_space(stage: Path, needed: int) -> None:
    """Refuse before writing what cannot fit; a disk that fills up meanwhile is found by the writing itself."""
    system = os.statvfs(stage)
    free = system.f_bavail * system.f_frsize
    if needed > free:
        raise UserError(
            f"no space left: {needed:,} bytes must be written, {free:,} are free; make room or choose another disk."
        )


def _write_index(
    files: list[WeightFile], names: dict[str, str], titles: list[str], targets: list[Any], stage: Path
) -> None:
    weight_map = {name: title for title, target in zip(titles, targets, strict=True) for name in target[3]}
    stay = [tensor for file in files for tensor in file.tensors if tensor[0] in names]
    parameters = 0
    for _, _, shape, _, _ in stay:
        elements = 1
        for size in shape:
            elements *= size
        parameters += elements
    sizes = {"total_parameters": parameters, "total_size": sum(end - begin for *_, begin, end in stay)}
    write_json(stage / INDEX, {"metadata": sizes, "weight_map": dict(sorted(weight_map.items()))})


def _bring_along(folder: Path, stage: Path, weights: set[str]) -> list[str]:
    """Copy everything but the weights; names what is left behind: other weights, reports, hidden folders."""
    left_out = []
    for directory, folders, names in os.walk(folder):
        inside = Path(directory).relative_to(folder)
        hidden = [name for name in folders if name.startswith(".") or (Path(directory) / name).is_symlink()]
        left_out += [str(inside / name) + "/" for name in hidden]
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted(names):
            relative = str(inside / name)
            if relative in weights or relative in ("config.json", INDEX):
                continue
            if name.endswith(WEIGHT_SUFFIXES) or relative in REPORTS:
                left_out.append(relative)
                continue
            (stage / inside).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plain_file(folder, relative), stage / inside / name)
    return sorted(left_out)


@contextlib.contextmanager
def _errors_of_disk(src: str | Path) -> Iterator[None]:
    """Read errors as sentences; `staged_output` has those of writing."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"checkpoint {str(src)!r}: {error}; give an intact checkpoint.") from None
    except OSError as error:
        raise UserError(f"checkpoint {str(src)!r} cannot be moved ({error.strerror}); check the disk.") from None
