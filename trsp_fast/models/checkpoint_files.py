"""Reading a checkpoint's folder that is not to be trusted: links, JSON, safetensors headers. Needs no torch."""

import contextlib
import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trsp_fast.errors import UserError
from trsp_fast.models.families import check_causal_fields, check_remote_code, check_weights_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass
class WeightFile:
    name: str
    descriptor: int
    header: bytes
    data_bytes: int
    metadata: dict[str, str]
    tensors: list[tuple[str, str, tuple[int, ...], int, int]]  # name, dtype, shape, begin, end


def folder_of(src: str | Path) -> Path:
    folder = Path(src)
    if not folder.is_dir():
        raise UserError(f"checkpoint {str(src)!r} is not a folder; give the folder of a saved model.")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"checkpoint {str(src)!r} is a PEFT adapter; merge it into its model and save that first.")
    return folder


def plain_file(folder: Path, name: str) -> Path:
    """The real path of a file of the folder; a link may lead to another file of it or to a blob of the hub's cache."""
    path = folder / name
    real = Path(os.path.realpath(path))
    homes = [Path(os.path.realpath(folder)), Path(os.path.realpath(folder / ".." / ".." / "blobs"))]
    if not any(real.is_relative_to(home) for home in homes):
        raise UserError(f"{str(path)!r} is a link to {str(real)!r}, outside the checkpoint; put the file itself there.")
    try:
        mode = real.stat().st_mode
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error.strerror}); give a complete checkpoint.") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{str(path)!r} is not a regular file; give a checkpoint made of plain files.")
    return real


def read_config(src: str | Path, *, remote_code: bool = False) -> dict[str, Any]:
    """config.json of a checkpoint's folder, known to be of a model whose layers can be taken out.

    Raises:
        UserError: it is missing, broken, of another kind of model, or names code of its own without `remote_code`.
    """
    config = _read_json(folder_of(src), "config.json")
    check_weights_name(config, str(src))
    check_remote_code(config, str(src), allowed=remote_code)
    check_causal_fields(config)
    return config


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice: parsers differ on which of the two they believe."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"key {twice!r} stands twice")
        return values

    path = folder / name
    try:
        values = json.loads(plain_file(folder, name).read_text(encoding="utf-8"), object_pairs_hook=object_of)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{str(path)!r} is not valid JSON ({reason}); give an intact checkpoint.") from None
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} holds a {type(values).__name__}, not an object; give an intact checkpoint.")
    return values


@contextlib.contextmanager
def weight_files(folder: Path) -> Iterator[list[WeightFile]]:
    """The checkpoint's weight files, open and checked: the very files whose headers were read are moved later."""
    with contextlib.ExitStack() as stack:
        names, weight_map = _weight_names(folder)
        files = [_open_weights(folder, name, stack) for name in names]
        _check_names(files, weight_map)
        if (folder / SINGLE).exists() and names != [SINGLE]:
            raise UserError(
                f"checkpoint {str(folder)!r} holds both {SINGLE}, which transformers loads, and an {INDEX} of other "
                "files; take away the one that is not meant."
            )
        yield files


def loaded_files(folder: str | Path) -> list[Path]:
    """The safetensors files that transformers loads from a folder, and not what else lies there; none of no folder."""
    home = Path(folder)
    if (home / SINGLE).exists():
        return [home / SINGLE]
    weight_map = _read_json(home, INDEX).get("weight_map") if (home / INDEX).exists() else None
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({home / os.path.basename(str(name)) for name in names})


def _weight_names(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    if (folder / INDEX).exists():
        weight_map = _read_json(folder, INDEX).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            raise UserError(f"{str(folder / INDEX)!r} has no weight_map of names; give an intact checkpoint.")
        for name in weight_map.values():
            if os.path.basename(name) != name or not name.endswith(".safetensors") or "\0" in name:
                raise UserError(
                    f"{str(folder / INDEX)!r} names the file {name!r}, which is not a safetensors file of the folder; "
                    "give an intact checkpoint."
                )
        return sorted(set(weight_map.values())), weight_map
    if (folder / SINGLE).exists():
        return [SINGLE], None
    if any((folder / name).exists() for name in PICKLED):
        raise UserError(
            f"checkpoint {str(folder)!r} holds pickled weights (.bin), which can run code when read; convert it first: "
            "load it with transformers and call save_pretrained, which writes safetensors."
        )
    raise UserError(f"checkpoint {str(folder)!r} has no {SINGLE} and no {INDEX}; give a folder with weights.")


def _open_weights(folder: Path, name: str, stack: contextlib.ExitStack) -> WeightFile:
    surgery = extension()
    path = plain_file(folder, name)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    stack.callback(os.close, descriptor)
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if len(prefix) < 8 or length > size - 8:
        raise UserError(
            f"{str(folder / name)!r}: header length: {length} bytes are announced, the file has {size}; "
            "give an intact checkpoint."
        )
    if length > 100_000_000:
        raise UserError(f"{str(folder / name)!r}: header length: {length} is more than the format's 100,000,000 bytes.")
    header = os.pread(descriptor, length, 8)
    try:
        metadata, tensors = surgery.parse_header(header, size - 8 - length)
    except ValueError as error:
        raise UserError(f"{str(folder / name)!r}: {error}; give an intact checkpoint.") from None
    return WeightFile(name, descriptor, header, size - 8 - length, metadata, tensors)


def _check_names(files: list[WeightFile], weight_map: dict[str, str] | None) -> None:
    """Every tensor in one file only, and every one that the index names in the file it names."""
    home: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor[0] in home:
                raise UserError(
                    f"tensor {tensor[0]!r} is in {home[tensor[0]]!r} and in {file.name!r}; give an intact checkpoint."
                )
            home[tensor[0]] = file.name
    for name, file_name in (weight_map or {}).items():
        if home.get(name) != file_name:
            raise UserError(
                f"{INDEX!r}: weight_map: tensor {name!r} is not in {file_name!r}; give an intact checkpoint."
            )


def extension() -> Any:
    try:
        from trsp_fast import _surgery
    except ImportError as error:
        raise UserError(
            f"reading a checkpoint's files needs trsp_fast's C++ extension, which does not load ({error}); install a "
            "C++ compiler and reinstall trsp_fast."
        ) from None
    return _surgery
