"""Export of a model that no process holds: whole tensors come together a layer at a time, the first process writes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.models.checkpoint import align_header, load_config
from trsp_fast.models.checkpoint_files import INDEX, SINGLE
from trsp_fast.models.families import layer_stack
from trsp_fast.models.removal import without_weights
from trsp_fast.models.streamed_model import StreamedModel
from trsp_fast.models.tensor_names import cut_names
from trsp_fast.models.tensor_stream import open_tensors
from trsp_fast.models.verify import Check, same_bytes
from trsp_fast.run.output import write_json

FILE = 5e9  # bytes of weights in one file, or those of one layer where it is larger
Dtypes = dict[str, torch.dtype]  # of the export, by parameter
Whole = Callable[[Tensor], Tensor]  # a weight in one piece, in every process


def write_divided(
    model: PreTrainedModel, folder: Path | None, dtypes: Dtypes, whole: Whole, tokenizer: Any = None
) -> None:
    """What `save_checkpoint` writes, of a divided model: all processes call it, the one with a `folder` writes.

    Beside its own part that process holds one file's weights, in host memory.
    """
    if folder is not None:
        _write_settings(model, folder, dtypes, tokenizer)
    parts = _parts(model)
    files = _files(parts, dtypes)
    index: dict[str, str] = {}
    size = 0
    for number, file in enumerate(files, 1):
        name = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for part in file:
            tensors |= _gathered(model, part, dtypes, whole, keep=folder is not None)
        if folder is not None:
            _save(tensors, folder / name)
            index |= dict.fromkeys(tensors, name)
            size += sum(tensor.nbytes for tensor in tensors.values())
    if folder is not None and len(files) > 1:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        metadata = {"total_parameters": parameters, "total_size": size}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(index.items()))})


def verify_divided(model: PreTrainedModel, folder: Path | None, dtypes: Dtypes, whole: Whole) -> list[Check]:
    """The checks of `verify_checkpoint`, where the model is whole nowhere: every tensor is read back beside its own.

    All processes call it; the one with the `folder` has the checks.
    """
    from safetensors import safe_open

    from trsp_fast.models.checkpoint_files import loaded_files

    paths = loaded_files(folder) if folder is not None else []
    home = {name: path for path in paths for name in safe_open(path, "pt").keys()}  # noqa: SIM118 - not a dict
    seen, differing = set(), []
    for part in _parts(model):
        for name, tensor in _gathered(model, part, dtypes, whole, keep=folder is not None).items():
            seen.add(name)
            if name not in home or not same_bytes(safe_open(home[name], "pt").get_tensor(name), tensor):
                differing.append(name)
    if folder is None:
        return []
    differing += sorted(home.keys() - seen)
    odd = _key_problems(folder)
    return [
        Check("reload: no missing, unexpected or mismatched key", not odd, str(odd) if odd else f"{len(seen)} keys"),
        Check(
            "reload: every tensor byte-equal",
            not differing,
            f"{len(differing)} differ, {differing[0]} first" if differing else f"{len(seen)} tensors",
        ),
    ]


def _key_problems(folder: Path) -> dict[str, list[str]]:
    """What transformers would not find in the files, or not know, as its own loading says it of tensors without data.

    The class's own code runs in this process already, so its user has allowed it.
    """
    config = load_config(str(folder), remote_code=True)
    layers = list(range(config.get_text_config(decoder=True).num_hidden_layers))
    with open_tensors(folder) as tensors:
        path = cut_names(tensors, config.to_dict(), layers).path
        return StreamedModel(config, tensors, path, remote_code=True).problems


def _parts(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """The model's tensors, as they are divided: what is outside the layers, then each layer's."""
    stack = layer_stack(model)
    parts: list[dict[str, Tensor]] = [{} for _ in range(len(stack) + 1)]
    saved = set(model.state_dict())
    ignored = set(model._keys_to_ignore_on_save or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved - ignored:
            inside = name.startswith(f"{stack.path}.")
            parts[int(name[len(stack.path) + 1 :].partition(".")[0]) + 1 if inside else 0][name] = tensor
    return parts


def _files(parts: list[dict[str, Tensor]], dtypes: Dtypes) -> list[list[dict[str, Tensor]]]:
    files: list[list[dict[str, Tensor]]] = [[]]
    held = 0
    for part in parts:
        size = sum(tensor.numel() * dtypes.get(name, tensor.dtype).itemsize for name, tensor in part.items())
        if files[-1] and held + size > FILE:
            files.append([])
            held = 0
        files[-1].append(part)
        held += size
    return files


def _gathered(
    model: PreTrainedModel, part: dict[str, Tensor], dtypes: Dtypes, whole: Whole, *, keep: bool
) -> dict[str, Tensor]:
    """Whole tensors on the CPU under the names and in the form that transformers writes; nothing without `keep`."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = dict(_whole_ones(part, dtypes, whole, keep))
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, tensors).items()}


def _whole_ones(part: dict[str, Tensor], dtypes: Dtypes, whole: Whole, keep: bool) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in part.items():
        gathered = whole(tensor)
        if keep:
            yield name, gathered.to(dtypes.get(name, gathered.dtype)).cpu()


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, {"format": "pt"})
    align_header(path)


def _write_settings(model: PreTrainedModel, folder: Path, dtypes: Dtypes, tokenizer: Any) -> None:
    """Everything but the weights, by `save_pretrained` of the same architecture without any."""
    plain = without_weights(model, list(range(len(layer_stack(model)))))
    for name, parameter in plain.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder, state_dict={})
    (folder / SINGLE).unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
