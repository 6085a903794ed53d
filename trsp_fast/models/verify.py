"""The proof that a pruned model is the model with those layers bypassed, in memory and on disk."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp_fast.engine.precision import cast_parameters
from trsp_fast.errors import CheckFailed
from trsp_fast.models.checkpoint import exact_dtype, load_config, restore_own_dtypes
from trsp_fast.models.families import layer_count, layer_stack, slice_config, sliced_tensors
from trsp_fast.models.gates import bypassed
from trsp_fast.models.gathering import is_divided
from trsp_fast.models.removal import remove_layers

PROMPT, GENERATED = 12, 12  # tokens; short of any context, long enough for wrong cache slots to show
FOLDED_CHANGE = 10.0  # the most that a folded projection may have changed, in its norm; 2.5 was seen
GENERATION = "cached = uncached generation"


@dataclass(frozen=True)
class Check:
    """One thing that was proved, or not; `detail` says with which figure."""

    name: str
    passed: bool
    detail: str


def verify_removal(before: PreTrainedModel, after: PreTrainedModel, removed: Iterable[int]) -> list[Check]:
    """Prove in memory that `after` is `before` without the layers `removed`.

    Bypassed and pruned logits are compared for a difference of exactly 0.0, cached with uncached generation to the
    rounding of the dtype, tied weights by storage, the configuration by the length of every per-layer list.

    Args:
        before: the unpruned model, with the same weights in the layers that stay.
        after: the pruned model, on the same device and in the same dtype.
    """
    removed = list(removed)
    tokens, _ = prompt(before, GENERATED)
    with torch.no_grad(), bypassed(before, removed):
        expected = before.eval()(input_ids=tokens, use_cache=False).logits
    with torch.no_grad():
        logits = after.eval()(input_ids=tokens, use_cache=False).logits
    return [logits_check(logits, expected), _check_generation(after), *check_shape(before, after, removed)]


def check_shape(before: PreTrainedModel, after: PreTrainedModel, removed: list[int]) -> list[Check]:
    """What needs no weights, so that models on the meta device will do."""
    return [
        _check_counts(before, after, removed),
        _check_ties(before, after),
        _check_config(before, after, removed),
    ]


def verify_checkpoint(
    model: PreTrainedModel, folder: str | Path, dtype: torch.dtype | str = "auto"
) -> tuple[list[Check], PreTrainedModel]:
    """Reload `folder` with plain transformers: no key missing, unexpected or mismatched, every tensor byte-equal.

    Returns:
        The checks, and the reloaded model (on the CPU, in the checkpoint's dtypes).
    """
    from transformers import AutoModelForCausalLM

    # The class's own code runs in this process already, so its user has allowed it.
    options = {"dtype": dtype, "trust_remote_code": type(model).__module__.partition(".")[0] != "transformers"}
    reloaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    restore_own_dtypes(reloaded, folder)
    odd = {kind: sorted(map(str, info.get(kind) or [])) for kind in _KEY_PROBLEMS}
    odd = {kind: keys for kind, keys in odd.items() if keys}
    ours, theirs = model.state_dict(), reloaded.state_dict()
    differing = [name for name in ours.keys() & theirs.keys() if not same_bytes(ours[name], theirs[name])]
    differing += sorted(ours.keys() ^ theirs.keys())
    return [
        Check("reload: no missing, unexpected or mismatched key", not odd, str(odd) if odd else f"{len(theirs)} keys"),
        Check(
            "reload: every tensor byte-equal",
            not differing,
            f"{len(differing)} differ, {differing[0]} first" if differing else f"{len(ours)} tensors",
        ),
    ], reloaded


_KEY_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def verify_checkpoints(
    source: str | Path,
    pruned: str | Path,
    removed: Iterable[int],
    *,
    trained: bool,
    folded: Mapping[int, str] | None = None,
    remote_code: bool = False,
) -> list[Check]:
    """Prove on disk that `pruned` is `source` without the layers `removed`.

    Args:
        trained: the weights were trained before the cut, so that tensors may differ from the source. The architecture
            is then proved with the pruned checkpoint's own weights in the source's layers.
        folded: by layer of the source the name in it of a projection that may be far from its source: trsp_fast.fold.
        remote_code: run code that the checkpoints bring along.
    """
    from transformers import AutoModelForCausalLM

    removed = list(removed)
    stated = [load_config(str(folder), remote_code=remote_code).dtype for folder in (source, pruned)]
    exact = [exact_dtype(folder, dtype) for folder, dtype in zip((source, pruned), stated, strict=True)]
    before = AutoModelForCausalLM.from_pretrained(source, dtype=exact[0], trust_remote_code=remote_code)
    restore_own_dtypes(before, source)
    expected = remove_layers(before, removed)
    checks, after = verify_checkpoint(expected, pruned, exact[1])
    checks.append(dtype_check(stated[0] or before.config.dtype, stated[1] or after.config.dtype))
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (expected, after)]
    if shapes[0] != shapes[1]:
        odd = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
        return [*checks, Check("names and shapes of all tensors", False, f"{len(odd)} differ, {odd[0]} first")]
    if trained and not checks[1].passed:
        checks[1] = Check("names and shapes of all tensors", True, f"weights were trained, {checks[1].detail}")
        names = folded_names(layer_path(after), removed, folded)
        checks += [_check_descent(before, after, removed), _check_nearness(expected, after, names)]
        expected.load_state_dict(after.state_dict())  # shares its parameters with `before`
        _put_pieces_back(before, after, removed)
    for model in (before, expected, after):
        cast_parameters(model, torch.float32)  # mixed dtypes do not run; every stored dtype fits into fp32
    return checks + verify_removal(before, after, removed)


def _put_pieces_back(before: PreTrainedModel, after: PreTrainedModel, removed: list[int]) -> None:
    """Give `before` the trained pieces of tensors that hold one per layer, which a cut copies and does not share."""
    count, theirs = len(layer_stack(before)), dict(after.named_parameters())
    kept = torch.tensor([index for index in range(count) if index not in removed])
    with torch.no_grad():
        for end, dimension in sliced_tensors(before.config.to_dict()):
            for name, tensor in before.named_parameters():
                if name.endswith(end):
                    pieces = theirs[name].unflatten(dimension, (len(kept), -1)).to(tensor.dtype)
                    tensor.unflatten(dimension, (count, -1)).index_copy_(dimension, kept, pieces)


def require(checks: Iterable[Check]) -> None:
    """Raise `CheckFailed` naming the first check that did not hold."""
    for check in checks:
        if not check.passed:
            raise CheckFailed(f"not proven: {check.name} ({check.detail}); the result is not what it should be.")


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Equal dtype, shape and bits (NaN included)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.numel():
        return True
    flat = [t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (one, other)]
    return torch.equal(*flat)


def prompt(model: PreTrainedModel, generated: int) -> tuple[Tensor, int]:
    """Two rows of arbitrary, fixed tokens, and how many to generate after them: at most `generated`."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or PROMPT + generated
    tokens = torch.randint(0, config.vocab_size, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    length = min(generated, context - PROMPT)
    if length < 1:
        tokens, length = tokens[:, : max(1, context // 2)], context - max(1, context // 2)
    return tokens.to(next(model.parameters()).device), length


def generate(model: PreTrainedModel, tokens: Tensor, length: int, *, cache: bool) -> Any:
    """Greedy generation of exactly `length` tokens: `sequences`, and the `logits` of every step."""
    options: dict[str, Any] = {
        "max_new_tokens": length,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    options |= {"eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens), "num_beams": 1}
    return model.generate(tokens, use_cache=cache, **options)


def relative_error(logits: Tensor, expected: Tensor) -> Tensor:
    """The largest difference of each row of logits `[rows, vocabulary]`, as a share of the expected ones' spread."""
    scale = expected.double().std(-1).clamp(min=1e-30)
    return (logits.double() - expected.double()).abs().amax(-1) / scale


def allowed_error(model: PreTrainedModel) -> float:
    """Bound on `relative_error` between generation with a cache and without.

    Linear attention is summed in chunks without a cache and token by token with one: 4.6e-4 in fp32. A wrong cache
    slot is off by the spread itself.
    """
    dtype = next(model.parameters()).dtype
    if is_divided(model):  # rows may be kept in a wider one than layers are computed in
        with torch.no_grad():
            dtype = model(input_ids=prompt(model, 1)[0][:, :1], use_cache=False).logits.dtype
    precision = torch.finfo(dtype).eps
    return 8000 * precision if precision < 1e-5 else 32 * precision


def _check_generation(model: PreTrainedModel) -> Check:
    """Greedy generation with and without a cache: the same logits to rounding at every step, as far as both agree."""
    tokens, length = prompt(model, GENERATED)
    try:
        cached, uncached = (generate(model, tokens, length, cache=cache) for cache in (True, False))
    except Exception as problem:  # whatever generation raises, the pruned model is not usable
        return Check(GENERATION, False, f"{type(problem).__name__}: {problem}")
    worst = 0.0
    if not all(bool(torch.isfinite(logits).all()) for logits in (*cached.logits, *uncached.logits)):
        return Check(GENERATION, False, "logits are not finite")
    same = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    for step, (a, b) in enumerate(zip(cached.logits, uncached.logits, strict=True)):
        worst = max([worst, *relative_error(a, b)[same].tolist()])
        same &= cached.sequences[:, tokens.shape[1] + step] == uncached.sequences[:, tokens.shape[1] + step]
    return generation_check(worst, allowed_error(model), length)


def generation_check(worst: float, bound: float, length: int) -> Check:
    detail = f"{length} tokens, logits within {worst:.1e} of their spread, allowed {bound:.0e}"
    return Check(GENERATION, worst <= bound, detail)


def dtype_check(before: Any, after: Any) -> Check:
    """What config.json states is what transformers casts every weight to when it loads a checkpoint."""
    wrong = "" if before == after else f", not {before}"
    return Check("dtype that weights are loaded in", before == after, f"{after}{wrong}".replace("torch.", ""))


def logits_check(logits: Tensor, expected: Tensor) -> Check:
    """Exactly equal, not a bit of a logit off."""
    difference = float((logits.double() - expected.double()).abs().max())
    return Check("bypassed logits = pruned logits", torch.equal(logits, expected), f"largest difference {difference}")


def _check_descent(before: PreTrainedModel, after: PreTrainedModel, removed: list[int]) -> Check:
    """Each layer of `after` is nearest, by its largest weight, to the layer of `before` that it should come from."""
    sources = [_largest_weight(layer) for layer in layer_stack(before).layers]
    kept = [index for index in range(len(sources)) if index not in removed]
    wrong = []
    for own, layer in zip(kept, layer_stack(after).layers, strict=True):
        weight = _largest_weight(layer)
        distances = [float((weight - s).norm()) if s.shape == weight.shape else float("inf") for s in sources]
        if min(distances) < distances[own]:
            wrong.append(f"layer {own} is nearer to layer {distances.index(min(distances))}")
    return Check("every layer descends from its own", not wrong, wrong[0] if wrong else f"{len(kept)} layers")


def _check_nearness(expected: PreTrainedModel, after: PreTrainedModel, folded: set[str]) -> Check:
    """Training moves weights a little: none is as far from its source as an unrelated tensor would be."""
    theirs, changes = dict(after.named_parameters()), list[tuple[float, str, bool]]()
    for key, source in expected.named_parameters():
        if source.dim() > 1:
            change = float((theirs[key].detach().float() - source.detach().float()).norm())
            relative = change / max(float(source.detach().float().norm()), 1e-12)
            changes.append((relative, key, key.rpartition(".")[0] in folded))
    return nearness_check(changes)


def nearness_check(changes: Iterable[tuple[float, str, bool]]) -> Check:
    """Of the relative change of each tensor, its name and whether it was folded: those may change more."""
    found = list(changes)
    passed, parts = True, []
    for was_folded, bound, what in ((False, 1.0, ""), (True, FOLDED_CHANGE, "of {} folded ones ")):
        mine = [(relative, name) for relative, name, folded in found if folded == was_folded]
        if mine:
            worst, name = max(mine, key=lambda one: math.inf if math.isnan(one[0]) else one[0])
            passed &= worst < bound
            parts.append(f"{what.format(len(mine))}at most {worst:.2f}, {name}")
    return Check("weights are near their source", passed, f"relative change {'; '.join(parts)}")


def folded_names(path: str, removed: Iterable[int], folded: Mapping[int, str] | None) -> set[str]:
    """The projections' names in the pruned model, one a layer at most, whose layers are `path`.0, `path`.1, ..."""
    gone = set(removed)
    stay = {layer: name for layer, name in (folded or {}).items() if layer not in gone}
    return {f"{path}.{layer - sum(g < layer for g in gone)}.{name}" for layer, name in stay.items()}


def layer_path(model: PreTrainedModel) -> str:
    return next(name for name, module in model.named_modules() if module is layer_stack(model).layers)


def _largest_weight(layer: nn.Module) -> Tensor:
    return max(layer.parameters(), key=lambda p: p.numel()).detach().float()


def _check_counts(before: PreTrainedModel, after: PreTrainedModel, removed: list[int]) -> Check:
    stack = layer_stack(before)
    gone = sum(p.numel() for layer in removed for p in stack.layers[layer].parameters())
    ends = tuple(end for end, _ in sliced_tensors(before.config.to_dict()))
    pieces = sum(p.numel() for name, p in before.named_parameters() if ends and name.endswith(ends))
    gone += pieces // len(stack) * len(removed)
    expected, found = sum(p.numel() for p in before.parameters()) - gone, sum(p.numel() for p in after.parameters())
    return Check(
        "parameter count", found == expected, f"{found:,}" if found == expected else f"{found:,}, not {expected:,}"
    )


def _check_ties(before: PreTrainedModel, after: PreTrainedModel) -> Check:
    def tied(model: PreTrainedModel) -> bool:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head is None or head.weight.is_meta or is_divided(model):
            return head is not None and head.weight is embedding.weight
        return head.weight.data_ptr() == embedding.weight.data_ptr()

    was, now = tied(before), tied(after)
    return Check("tied weights", was == now, f"{'tied' if now else 'not tied'}, before {'tied' if was else 'not tied'}")


def _check_config(before: PreTrainedModel, after: PreTrainedModel, removed: list[int]) -> Check:
    """The configuration is the sliced one of `before`, agrees with the layers, and passes transformers' validation."""
    kept = [index for index in range(len(layer_stack(before))) if index not in removed]
    found = after.config.to_dict()
    wanted = type(after.config).from_dict(slice_config(before.config.to_dict(), kept)).to_dict()
    keys = (found.keys() | wanted.keys()) - _BOOKKEEPING
    wrong = [
        f"{key} is {found.get(key)}, not {wanted.get(key)}" for key in sorted(keys) if found.get(key) != wanted.get(key)
    ]
    named = [model.config.architectures for model in (after, before)]  # other engines go by it
    if all(named) and named[0] != named[1]:
        wrong.append(f"architectures is {named[0]}, not {named[1]}")
    try:
        layer_stack(after)
        type(after.config).from_dict(found)
    except Exception as error:  # transformers raises several kinds here
        wrong.append(f"{type(error).__name__}: {error}")
    name, count = layer_count(found.get("text_config") or found)
    return Check("configuration", not wrong, f"{name} = {count}" + (f", wrong: {wrong[0]}" if wrong else ""))


# Fields that say how a model was stored, not what it computes.
_BOOKKEEPING = {
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_attn_implementation",
}
