"""Facts about model families, as data: where the decoder layers are and which configuration fields are per layer.

`slice_config` works on the plain dict of a config.json, so that a checkpoint can be cut without importing transformers.
"""

import typing
from dataclasses import dataclass
from typing import Any

from trsp_fast.errors import UserError

if typing.TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# The names under which configurations keep their number of layers.
COUNT_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

# Lists that may have one entry per layer by accident only.
NOT_PER_LAYER = frozenset(
    {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "bad_words_ids", "suppress_tokens", "id2label"}
)

# Families in which layers share tensors or must keep a period: cutting them needs more than a rename.
UNSUPPORTED = {
    "gemma3n": "its per-layer embeddings are one tensor that must be sliced with the layers",
    "gemma3n_text": "its per-layer embeddings are one tensor that must be sliced with the layers",
    "gemma4": "its per-layer embeddings and shared key-value layers must be cut with the layers",
    "gemma4_text": "its per-layer embeddings and shared key-value layers must be cut with the layers",
    "jamba": "its attention layers follow a fixed period that a cut breaks",
}


@dataclass(frozen=True)
class LayerStack:
    """The decoder layers of a model: `owner` is the module whose child list they are, `path` that list's name."""

    path: str
    layers: "nn.ModuleList"
    owner: "nn.Module"

    def __len__(self) -> int:
        return len(self.layers)


def layer_stack(model: "PreTrainedModel") -> LayerStack:
    """Find the decoder layers: the outermost ModuleList with as many entries as the configuration has layers.

    Raises:
        UserError: the model is no decoder-only causal language model, or its layers cannot be told.
    """
    from torch import nn

    config = model.config.get_text_config(decoder=True)
    check_causal(model.config, type(model).__name__)
    count = config.num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(m) for m in module}) <= 2
    ]
    outermost = min((name.count(".") for name, _ in lists), default=0)
    lists = [(name, module) for name, module in lists if name.count(".") == outermost]
    if len(lists) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(lists)} lists of {count} layers, not one; give a plain decoder model."
        )
    path, layers = lists[0]
    return LayerStack(path, layers, model.get_submodule(path.rpartition(".")[0]))


def check_causal(config: Any, architecture: str | None = None) -> None:
    """Refuse what is not a decoder-only causal language model with independent layers.

    Raises:
        UserError: with the reason and the way out.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = architecture or (config.architectures or ["no architecture"])[0]
    check_causal_fields({**config.to_dict(), "architectures": [name]})
    causal = {c for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for c in _as_tuple(names)}
    if name not in causal:
        raise UserError(f"{name} is not a causal language model; trsp_fast prunes decoder-only ones, give one.")


def check_causal_fields(config: dict[str, Any]) -> None:
    """The part of `check_causal` that a config.json's dict can tell, without transformers.

    Raises:
        UserError: with the reason and the way out.
    """
    name = (config.get("architectures") or ["no architecture"])[0]
    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise UserError(
            f"{name} is an encoder-decoder; trsp_fast prunes decoder-only causal language models, give one."
        )
    if not str(name).endswith(_CAUSAL_ENDINGS) or (kind in _BIDIRECTIONAL and not config.get("is_decoder")):
        raise UserError(f"{name} is not a causal language model; trsp_fast prunes decoder-only ones, give one.")
    if kind in UNSUPPORTED:
        raise UserError(f"{kind} is not supported: {UNSUPPORTED[kind]}; choose a model of another family.")
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise UserError(
            f"{name} scales attention by the layer's own index, which a cut changes; choose a model without "
            "scale_attn_by_inverse_layer_idx."
        )
    if config.get("quantization_config") is not None:
        raise UserError(f"{name} has quantised weights; prune the unquantised model and quantise the result.")


# How transformers ends the names of classes that predict the next token.
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Encoders that transformers also offers with a causal head.
_BIDIRECTIONAL = frozenset({"bert", "roberta", "xlm-roberta", "electra", "camembert", "megatron-bert", "roformer"})


def _as_tuple(names: Any) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names,)


def layer_count(config: dict[str, Any]) -> tuple[str, int]:
    """Name and value of the field that counts the layers in a config.json's dict."""
    for name in COUNT_FIELDS:
        if isinstance(config.get(name), int):
            return name, config[name]
    raise UserError(f"the configuration has none of {', '.join(COUNT_FIELDS)}; its number of layers cannot be told.")


def text_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json's dict that describes the decoder: all of it, or a composite model's text_config."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def slice_config(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """The configuration of the model that keeps only the layers `kept` (ascending), from a config.json's dict.

    Every top-level list with one entry per layer is sliced (`layer_types`, `no_rope_layers`, ...); what counts layers
    from the bottom or the top (`first_k_dense_replace`) is recounted.
    """
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": slice_config(config["text_config"], kept)}
    name, count = layer_count(config)
    sliced = dict(config)
    sliced[name] = len(kept)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == count and key not in NOT_PER_LAYER:
            sliced[key] = [value[layer] for layer in kept]
    if isinstance(config.get("first_k_dense_replace"), int):
        sliced["first_k_dense_replace"] = sum(layer < config["first_k_dense_replace"] for layer in kept)
    for key in ("num_kv_shared_layers", "per_layer_config"):
        if config.get(key):
            raise UserError(
                f"the configuration has {key} = {config[key]}; such models are not supported, choose another."
            )
    return sliced
