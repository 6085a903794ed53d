"""The proof of trsp_fast.models.verify for checkpoints that do not fit into memory.

Tensors are compared in chunks and logits computed layer by layer, so that the most that is held is one layer beside the
embeddings and the head.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trsp_fast.config import checked_layers
from trsp_fast.errors import UserError
from trsp_fast.models.checkpoint import checkpoint_bytes, load_config, sentence_of
from trsp_fast.models.families import layer_count, sliced_tensors, text_fields
from trsp_fast.models.free_memory import free_memory
from trsp_fast.models.gates import bypassed
from trsp_fast.models.streamed_model import StreamedModel
from trsp_fast.models.tensor_names import CutNames, cut_names
from trsp_fast.models.tensor_stream import Pieces, SpreadTensor, StoredTensor, open_tensors, side_by_side
from trsp_fast.models.verify import (
    GENERATION,
    Check,
    allowed_error,
    check_shape,
    dtype_check,
    folded_names,
    generate,
    generation_check,
    logits_check,
    nearness_check,
    prompt,
    relative_error,
)

GENERATED = 3  # tokens; every one is a pass over the files, and the second would show a wrong cache slot


def needs_streaming(source: str | Path, pruned: str | Path) -> bool:
    """Whether the proof in memory might not fit: both models, in fp32 where the files may hold 16 bits a weight."""
    return 2 * (checkpoint_bytes(source) + checkpoint_bytes(pruned)) > free_memory()


def verify_streamed(
    source: str | Path,
    pruned: str | Path,
    removed: Iterable[int],
    *,
    trained: bool,
    folded: Mapping[int, str] | None = None,
    remote_code: bool = False,
) -> list[Check]:
    """Prove on disk that `pruned` is `source` without the layers `removed`, in the memory of about one layer.

    The checks are those of `verify_checkpoints`, with the same names; logits and generation are computed on the CPU in
    fp32, with each layer read from its file for its own forward pass.

    Args:
        source: a folder with config.json and safetensors weights.
        trained, folded: see `verify_checkpoints`.
        remote_code: run code that the checkpoints bring along.

    Raises:
        UserError: a checkpoint is broken or incomplete, or the layers are not its own.
    """
    configs = [load_config(str(folder), remote_code=remote_code) for folder in (source, pruned)]
    fields = configs[0].to_dict()
    _, count = layer_count(text_fields(fields))
    gone = checked_layers(removed, count)
    kept = [layer for layer in range(count) if layer not in gone]
    with open_tensors(source) as old, open_tensors(pruned) as new, torch.no_grad():
        stated = dtype_check(*(_loaded_dtype(config, files) for config, files in zip(configs, (old, new), strict=True)))
        names = cut_names(old, fields, kept)
        with sentence_of(str(pruned)):
            after = StreamedModel(configs[1], new, names.path, remote_code=remote_code)
        with sentence_of(str(source)):
            before = StreamedModel(configs[0], old, names.path, remote_code=remote_code)
        if missing := before.problems.get("missing_keys"):
            raise UserError(f"model {str(source)!r} lacks {missing[0]}, which would be random; give all of it.")
        proof = _Proof(old, new, names, fields, kept, count)
        odd = after.problems
        checks = [
            Check("reload: no missing, unexpected or mismatched key", not odd, str(odd) if odd else f"{len(new)} keys"),
            *proof.tensors(trained, folded_names(names.path, gone, folded), before),
        ]
        if odd or not checks[1].passed:  # another model; a changed byte goes on, as its logits may tell more
            return [*checks, stated, *check_shape(before.model, after.model, gone)]
        if trained:
            before = StreamedModel(configs[0], proof.trained_weights(), names.path, remote_code=remote_code)
        return [*checks, stated, *_check_logits(before, after, gone)]


def _loaded_dtype(config: Any, tensors: dict[str, StoredTensor]) -> Any:
    """The dtype that transformers loads a checkpoint in: the one stated, else that of the first weight."""
    if config.dtype is not None:
        return config.dtype
    return next((tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point), None)


class _Proof:
    """The tensors of both checkpoints, side by side."""

    def __init__(
        self,
        old: dict[str, StoredTensor],
        new: dict[str, StoredTensor],
        names: CutNames,
        fields: dict[str, Any],
        kept: list[int],
        count: int,
    ) -> None:
        self.old, self.new, self.names, self.kept, self.count = old, new, names, kept, count
        self._sliced = sliced_tensors(fields)
        self.shared = {name: new_name for name, new_name in names.new.items() if new_name in new}

    def tensors(self, trained: bool, folded: set[str], before: StreamedModel) -> list[Check]:
        """Names and shapes; then every byte, or, where weights were trained, where they come from."""
        lost = [name for name in self.names.new if name not in self.shared and not self._is_double(name)]
        first = before.first_used(lost, self.old)
        odd = [f"{first} is not there"] if first else []
        odd += [f"{name} is new" for name in sorted(self.new.keys() - set(self.names.new.values()))]
        odd += [f"{name} has another shape" for name in self.shared if self._shape(name) != self._new(name).shape]
        shapes = Check("names and shapes of all tensors", not odd, odd[0] if odd else f"{len(self.shared)} tensors")
        if odd:
            return [shapes]
        if trained:
            return [shapes, self._descent(folded), self._nearness(folded)]
        differing = [name for name in self.shared if not self._same(name)]
        detail = f"{len(differing)} differ, {differing[0]} first" if differing else f"{len(self.shared)} tensors"
        return [shapes, Check("reload: every tensor byte-equal", not differing, detail)]

    def trained_weights(self) -> dict[str, StoredTensor]:
        """The source's tensors with the pruned checkpoint's own in place of those of the layers that stay."""
        weights = {name: old for name, old in self.old.items() if name not in self.names.new}
        for name in self.shared:
            tensor, pieces = self._new(name), self._pieces(name)
            place = (tensor.descriptor, tensor.offset, tensor.dtype, tensor.shape)
            weights[name] = SpreadTensor(*place, pieces) if pieces else tensor
        return weights

    def _new(self, name: str) -> StoredTensor:
        return self.new[self.names.new[name]]

    def _pieces(self, name: str) -> Pieces | None:
        dimensions = [dimension for end, dimension in self._sliced if name.endswith(end)]
        return Pieces(dimensions[0], self.kept, self.count) if dimensions else None

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape that the tensor has after the cut."""
        shape, pieces = list(self.old[name].shape), self._pieces(name)
        if pieces:
            shape[pieces.dimension] = shape[pieces.dimension] // self.count * len(self.kept)
        return tuple(shape)

    def _same(self, name: str) -> bool:
        if self.old[name].dtype != self._new(name).dtype:
            return False
        chunks = side_by_side(self.old[name], self._new(name), self._pieces(name))
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in chunks)

    def _is_double(self, name: str) -> bool:
        """Whether a tensor that stays holds the same: files may keep both of two tied tensors."""
        one = self.old[name]
        return any(
            all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in side_by_side(one, other, None))
            for other in (self.old[shared] for shared in self.shared if not shared.startswith(self.names.path))
            if other.dtype == one.dtype and other.shape == one.shape
        )

    def _nearness(self, folded: set[str]) -> Check:
        """Training moves weights a little: none is as far from its source as an unrelated tensor would be."""
        changes = []
        for name, new_name in self.shared.items():
            if len(self.old[name].shape) < 2:
                continue
            change = norm = 0.0
            for a, b in side_by_side(self.old[name], self._new(name), self._pieces(name)):
                change += float((b.double() - a.double()).square().sum())
                norm += float(a.double().square().sum())
            changes.append((change**0.5 / max(norm**0.5, 1e-12), name, new_name.rpartition(".")[0] in folded))
        return nearness_check(changes)

    def _descent(self, folded: set[str]) -> Check:
        """Each layer that stays is nearest, by its largest tensor but folded ones, to the layer it should come from."""
        sources = [self._layer(self.old, layer) for layer in range(self.count)]
        wrong = []
        for position, own in enumerate(self.kept):
            prefix = f"{self.names.path}.{position}."
            own_tensors = self._layer(self.new, position).items()
            others = [item for item in own_tensors if prefix + item[0].rpartition(".")[0] not in folded]
            end, weight = max(others or own_tensors, key=lambda item: (item[1].elements, item[0]))
            rivals = [layer.get(end) for layer in sources]
            distances = [_distance(weight, rival) for rival in rivals]
            if min(distances) < distances[own]:
                wrong.append(f"layer {own} is nearer to layer {distances.index(min(distances))}")
        return Check("every layer descends from its own", not wrong, wrong[0] if wrong else f"{len(self.kept)} layers")

    def _layer(self, tensors: dict[str, StoredTensor], number: int) -> dict[str, StoredTensor]:
        prefix = f"{self.names.path}.{number}."
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _distance(one: StoredTensor, other: StoredTensor | None) -> float:
    """Of a million weights at most: that tells layers apart, and every layer is read for every one that stays."""
    if other is None or other.shape != one.shape:
        return float("inf")
    a, b = (tensor.read(0, min(1_000_000, tensor.elements)).double() for tensor in (one, other))
    return float((a - b).norm())


def _check_logits(before: StreamedModel, after: StreamedModel, removed: list[int]) -> list[Check]:
    """Generation with a cache beside one pass without, whose logits are compared with those of the bypassed source."""
    with after.running() as small:
        tokens, length = prompt(small, GENERATED)
        cached, problem = None, ""
        try:
            cached = generate(small, tokens, length, cache=True)
        except UserError:
            raise
        except Exception as error:  # whatever generation raises, the pruned model is not usable
            problem = f"{type(error).__name__}: {error}"
        start = tokens.shape[1] - 1
        tokens = tokens if cached is None else cached.sequences[:, :-1]
        logits = _logits(small, tokens)
        if cached is None:
            generation = Check(GENERATION, False, problem)
        else:
            errors = [relative_error(step, logits[:, start + i]) for i, step in enumerate(cached.logits)]
            worst = float(torch.stack(errors).max())  # NaN if any is, which no bound allows
            generation = generation_check(worst, allowed_error(small), length)
    with before.running() as model, bypassed(model, removed):
        expected = _logits(model, tokens)
    return [logits_check(logits, expected), generation, *check_shape(before.model, after.model, removed)]


def _logits(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits
