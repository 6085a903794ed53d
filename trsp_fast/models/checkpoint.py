"""Checkpoints on disk: loading with sentences instead of tracebacks, and an export that maps well."""

import contextlib
import errno
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trsp_fast.errors import UserError
from trsp_fast.models.checkpoint_files import INDEX, folder_of, loaded_files
from trsp_fast.models.families import (
    check_causal,
    check_remote_code,
    check_weights_name,
    layer_count,
    layer_stack,
    text_fields,
)
from trsp_fast.models.tensor_names import cut_names, dropped_predictors

ALIGNMENT = 4096  # bytes; weights are mapped from the file, and CPU code paths depend on their alignment


def load_model(
    name: str, *, dtype: str = "auto", device: str = "auto", revision: str | None = None, remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model from a local folder or the hub, in evaluation mode.

    Args:
        dtype: "auto" keeps the checkpoint's own.
        device: "auto" is the first GPU, else the CPU.

    Raises:
        UserError: nothing is there, or it is no decoder-only causal language model, or a weight is not finite, or it
            brings its own code without `remote_code`.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(name, revision=revision, remote_code=remote_code)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": remote_code, "output_loading_info": True}
    with sentence_of(name):
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, config=config, **options)
    if missing := sorted(map(str, info.get("missing_keys") or [])):
        raise UserError(
            f"model {name!r} lacks {len(missing)} of its weights ({missing[0]} first), which would be random; "
            "give a complete checkpoint."
        )
    if dtype == "auto":
        restore_own_dtypes(model, name)
    layer_stack(model)
    check_finite(model)
    return model.to(resolve_device(device)).eval()


def load_config(name: str, *, revision: str | None = None, remote_code: bool = False) -> Any:
    """The configuration of a causal language model; code of the checkpoint's own runs with `remote_code` only.

    Raises:
        UserError: as for `load_model`.
    """
    from transformers import AutoConfig, PreTrainedConfig

    local = os.path.isdir(name)
    if local:
        folder_of(name)  # refuses adapters
    if local and not os.path.exists(os.path.join(name, "config.json")):
        raise UserError(f"model folder {name!r} has no config.json; give a folder saved by save_pretrained.")
    options: dict[str, Any] = {"revision": revision} | ({"local_files_only": True} if local else {})
    with sentence_of(name):
        fields, _ = PreTrainedConfig.get_config_dict(name, **options)
        check_weights_name(fields, name)
        check_remote_code(fields, name, allowed=remote_code)
        config = AutoConfig.from_pretrained(name, trust_remote_code=remote_code, **options)
        check_causal(config)
    return config


def predictors_not_loaded(name: str, revision: str | None = None) -> str | None:
    """What the user is told of tensors of multi-token prediction, which transformers does not load; None of none."""
    from huggingface_hub import try_to_load_from_cache
    from safetensors import safe_open
    from transformers import PreTrainedConfig

    names: list[str] = []
    if os.path.isdir(name):
        for path in loaded_files(name):
            with safe_open(path, "pt") as file:
                names += file.keys()
    elif isinstance(index := try_to_load_from_cache(name, INDEX, revision=revision), str):
        names = list(read_json(Path(index)).get("weight_map", {}))
    fields, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    try:
        _, count = layer_count(text_fields(fields))
        found = cut_names(names, fields, list(range(count))).predicting
    except UserError:  # not told by the names; the model in memory is what counts
        return None
    return dropped_predictors(len(found)) if found else None


@contextlib.contextmanager
def sentence_of(name: str) -> Iterator[None]:
    """transformers, safetensors and the hub raise dozens of kinds for a bad checkpoint: all as one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model {name!r} cannot be loaded ({_first_line(error)}); give a folder or hub name of a causal LM."
        ) from None


def load_tokenizer(name: str, *, revision: str | None = None, remote_code: bool = False) -> Any:
    """The tokenizer that belongs to a checkpoint.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=remote_code)
    except Exception as error:  # a missing tokenizer surfaces as any of a dozen types
        raise UserError(
            f"model {name!r} has no usable tokenizer ({_first_line(error)}); "
            "add its tokenizer files, or give the data as a .safetensors file of tokens."
        ) from None
    return tokenizer


def restore_own_dtypes(model: PreTrainedModel, folder: str | Path) -> None:
    """Give each parameter the dtype and the bytes that it has in the files of `folder`.

    transformers casts everything to the configuration's one dtype, which loses what a file holds in a wider one.
    """
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    inside = f"{model.base_model_prefix}."  # old files name the tensors of the model without its head
    parameters |= {name.removeprefix(inside): p for name, p in parameters.items() if name.startswith(inside)}
    for path in loaded_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                parameter = parameters.get(name)
                if parameter is not None and _DTYPES.get(file.get_slice(name).get_dtype()) != parameter.dtype:
                    parameter.data = file.get_tensor(name).to(parameter.device)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def exact_dtype(folder: str | Path, stated: torch.dtype | None) -> torch.dtype | str:
    """The dtype to load a checkpoint in without rounding any weight: "auto" if all have the one that is stated."""
    from safetensors import safe_open

    found = set()
    for path in loaded_files(folder):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
    dtypes = {_DTYPES[name] for name in found if name in _DTYPES}
    if stated is None or dtypes <= {stated}:
        return "auto"
    return torch.float64 if torch.float64 in dtypes else torch.float32


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{resolved.type} is not supported")
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {device!r} cannot be used ({_first_line(error)}); give cpu or a GPU that is there."
        ) from None
    return resolved


def check_finite(model: PreTrainedModel) -> None:
    """Raise `UserError` naming the first parameter with a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            count = int((~torch.isfinite(parameter)).sum())
            raise UserError(f"weight {name} has {count} values that are not finite; give a model with finite weights.")


def save_checkpoint(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> None:
    """`save_pretrained` into an existing folder, with tensor data at multiples of 4,096 bytes.

    Raises:
        OSError: with ENOSPC where the disk is full.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for path in sorted(folder.glob("*.safetensors")):
        align_header(path)


def align_header(path: Path, multiple: int = ALIGNMENT) -> None:
    """Rewrite a safetensors file so that its tensor data starts at a multiple of `multiple` bytes.

    The format allows the JSON header to end in spaces; nothing else changes.
    """
    with path.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        start = -(-(8 + length) // multiple) * multiple
        if start == 8 + length:
            return
        header = source.read(length)
        partial = path.with_suffix(".partial")
        with partial.open("wb") as target:
            target.write(struct.pack("<Q", start - 8) + header.ljust(start - 8))
            while chunk := source.read(1 << 24):
                target.write(chunk)
    partial.chmod(0o644)
    os.replace(partial, path)


def checkpoint_bytes(folder: str | Path) -> int:
    """Bytes of the weight files of a checkpoint."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} cannot be read ({_first_line(error)}); give a folder written by prune."
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} holds a {type(values).__name__}, not an object; give prune's folder.")
    return values


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
