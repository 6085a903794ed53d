"""Facts about model families, as data: where the decoder layers are and which configuration fields are per layer.

`slice_config` works on the plain dict of a config.json, so that a checkpoint can be cut without importing transformers.
"""

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trsp_fast.errors import UserError

if typing.TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# The names under which configurations keep their number of layers.
COUNT_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")

# The names under which they count layers of multi-token prediction, which are none of the decoder's.
MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")

# Lists that may have one entry per layer by accident only.
NOT_PER_LAYER = frozenset(
    {
        "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "bad_words_ids", "suppress_tokens", "id2label",
        "mlp_multipliers", "ssm_multipliers", "time_step_limit",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What is special about a model type beyond its configuration's fields; most types need no record.

    sliced_tensors: (end of the name, dimension) of tensors that hold one piece per layer along that dimension.
    written_out: fields that config.json must have to be cut without transformers, which would derive them from the
        layers' numbers where they are missing. None: what it derives is not known.
    last_type: the layer type that transformers forces on the last layer when it loads the configuration.
    mtp: layers of multi-token prediction that transformers takes for granted where config.json does not count them.
    refused: why layers cannot be taken out, where that is so.
    plain_head: the logits are a linear layer of the last hidden states and the loss is their mean cross-entropy, as
        read in transformers 5.23, unless a field of _HEAD_SWITCHES says otherwise.
    """

    sliced_tensors: tuple[tuple[str, int], ...] = ()
    written_out: tuple[str, ...] | None = None
    last_type: str | None = None
    mtp: int = 0
    refused: str | None = None
    plain_head: bool = False


_PER_LAYER_EMBEDDINGS = (("embed_tokens_per_layer.weight", 1), ("per_layer_model_projection.weight", 0))

_UNIFORM = Family(written_out=(), plain_head=True)
_TYPES = Family(written_out=("layer_types",), plain_head=True)

# model_type -> what is special. Fields of configurations that depend on layer numbers are in _FIELDS below.
FAMILIES = {
    **dict.fromkeys(
        (
            "apertus", "arcee", "bamba", "biogpt", "bloom", "codegen", "cohere", "ernie4_5", "falcon", "falcon_h1",
            "gemma", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite", "granitemoe", "helium",
            "hunyuan_v1_dense", "llama", "mamba", "mamba2", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2",
            "olmoe", "opt", "persimmon", "phi", "phi3", "seed_oss", "stablelm", "starcoder2", "xglm",
        ),
        _UNIFORM,
    ),
    **dict.fromkeys(
        (
            "cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "granitemoehybrid", "lfm2", "minimax",
            "ministral", "olmo3", "qwen3_5_text", "qwen3_next",
        ),
        _TYPES,
    ),
    # Their layers differ only where sliding windows are in use, see disk_obstacle.
    **dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), _TYPES),
    "deepseek_v2": Family(written_out=("first_k_dense_replace",), plain_head=True),
    **dict.fromkeys(
        ("deepseek_v3", "glm4_moe"), Family(written_out=("first_k_dense_replace",), mtp=1, plain_head=True)
    ),
    "gemma3n_text": Family(sliced_tensors=_PER_LAYER_EMBEDDINGS, plain_head=True),
    "gemma4_text": Family(
        sliced_tensors=_PER_LAYER_EMBEDDINGS, last_type="full_attention", plain_head=True
    ),
    "gpt_neo": Family(written_out=("attention_layers",), plain_head=True),
    "jamba": Family(
        written_out=("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset"),
        plain_head=True,
    ),
    "llama4_text": Family(written_out=("layer_types", "no_rope_layers", "moe_layers"), plain_head=True),
    # Its logits are always capped.
    "recurrent_gemma": Family(written_out=("block_types",)),
    "smollm3": Family(written_out=("layer_types", "no_rope_layers"), plain_head=True),
    "rwkv": Family(refused="its first layer is unlike the others and its state is kept in a form of its own"),
    "zamba": Family(refused="its attention layers share one block, so a layer is not its own"),
    "zamba2": Family(refused="its attention layers share one block, so a layer is not its own"),
}  # fmt: skip

# Fields that scale or cap logits or add to the loss, and the value at which they do not (nor does None).
_HEAD_SWITCHES = {
    "final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0,
    "z_loss_coefficient": 0.0, "output_router_logits": False,
}  # fmt: skip


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

    from trsp_fast.models.gathering import own_class

    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            "the model carries a PEFT adapter, which knows layers by number; merge it (merge_and_unload) first."
        )
    if (parts := getattr(model, "_tp_size", None) or 1) > 1:
        raise UserError(
            f"the model's tensors are sharded over {parts} processes; load it whole, prune it, then shard it."
        )
    config = model.config.get_text_config(decoder=True)
    check_causal(model.config, own_class(model).__name__)
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
    if name not in causal and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise UserError(f"{name} is not a causal language model; trsp_fast prunes decoder-only ones, give one.")


def check_causal_fields(config: dict[str, Any]) -> None:
    """The part of `check_causal` that a config.json's dict can tell, without transformers.

    Raises:
        UserError: with the reason and the way out.
    """
    named, kind = config.get("architectures") or ["no architecture"], config.get("model_type")
    if not (isinstance(named, list) and isinstance(named[0], str) and isinstance(kind, str | None)):
        raise UserError(
            f"the configuration's architectures and model_type are {named!r:.80} and {kind!r:.80}, not a list of names "
            "and a name; give an intact checkpoint."
        )
    name = named[0]
    if config.get("is_encoder_decoder"):
        raise UserError(
            f"{name} is an encoder-decoder; trsp_fast prunes decoder-only causal language models, give one."
        )
    if not str(name).endswith(_CAUSAL_ENDINGS) or (kind in _BIDIRECTIONAL and not config.get("is_decoder")):
        raise UserError(f"{name} is not a causal language model; trsp_fast prunes decoder-only ones, give one.")
    if refused := family(config).refused:
        raise UserError(f"{kind} is not supported: {refused}; choose a model of another family.")
    if config.get("scale_attn_by_inverse_layer_idx"):
        raise UserError(
            f"{name} scales attention by the layer's own index, which a cut changes; choose a model without "
            "scale_attn_by_inverse_layer_idx."
        )
    if config.get("quantization_config") is not None:
        raise UserError(f"{name} has quantised weights; prune the unquantised model and quantise the result.")


def check_weights_name(config: dict[str, Any], name: str) -> None:
    """Refuse a config.json's dict that sends transformers to other weights than those that are looked for.

    Raises:
        UserError: with the way out.
    """
    if (file := config.get("transformers_weights")) is not None:
        raise UserError(
            f"model {name!r} names its weights {file!r} itself (transformers_weights in config.json); give them the "
            "usual name and take that field out."
        )


def check_remote_code(config: dict[str, Any], name: str, *, allowed: bool) -> None:
    """Refuse a checkpoint whose config.json's dict names code of its own, unless running that is allowed.

    Raises:
        UserError: with both ways out.
    """
    if config.get("auto_map") and not allowed:
        raise UserError(
            f"model {name!r} brings its own code (auto_map in config.json), which would be run; allow that with "
            "--allow-remote-code, or take auto_map out of its config.json to use the class of transformers."
        )
    for fields in (config, text_fields(config)):
        for key in _KERNELS:
            chosen = fields.get(key)
            found = [value for value in (chosen.values() if isinstance(chosen, dict) else [chosen]) if value]
            if not allowed and any("/" in str(value) for value in found):
                raise UserError(
                    f"model {name!r} names code of the hub ({key} = {chosen!r:.80} in config.json), which would be "
                    f"run; allow that with --allow-remote-code, or take {key} out of its config.json."
                )


# Fields under which transformers takes a repository of the hub for an implementation and runs its code.
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")

# How transformers ends the names of classes that predict the next token.
_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Encoders that transformers also offers with a causal head.
_BIDIRECTIONAL = frozenset({"bert", "roberta", "xlm-roberta", "electra", "camembert", "megatron-bert", "roformer"})


def _as_tuple(names: Any) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names,)


def layer_count(config: dict[str, Any]) -> tuple[str, int]:
    """Name and value of the field that counts the layers in a config.json's dict."""
    for name in COUNT_FIELDS:
        if isinstance(config.get(name), int) and not isinstance(config[name], bool):
            if not 0 < config[name] <= 10_000:
                raise UserError(f"the configuration has {name} = {config[name]}; give a model with 1 to 10,000 layers.")
            return name, config[name]
    raise UserError(f"the configuration has none of {', '.join(COUNT_FIELDS)}; its number of layers cannot be told.")


def text_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json's dict that describes the decoder: all of it, or a composite model's text_config."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def family(config: dict[str, Any]) -> Family:
    """The record of a config.json's dict, an empty one for families without special cases."""
    return FAMILIES.get(str(text_fields(config).get("model_type")), Family())


def sliced_tensors(config: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """The tensors that must themselves be cut with the layers: (end of the name, dimension)."""
    return family(config).sliced_tensors if text_fields(config).get("hidden_size_per_layer_input") else ()


def mtp_layers(config: dict[str, Any]) -> int:
    """How many layers of multi-token prediction a config.json's dict counts beside the decoder's own."""
    fields = text_fields(config)
    counts = [fields[name] for name in MTP_FIELDS if isinstance(fields.get(name), int)]
    return min(max(counts[0], 0), 1000) if counts else family(config).mtp


def head_obstacle(config: dict[str, Any]) -> str | None:
    """Why the loss is more than the mean cross-entropy of a linear layer's logits, None if it is just that."""
    if text_fields(config) is not config:
        return "a composite model has a loss of its own"
    if not family(config).plain_head:
        return f"{config.get('model_type')} is not known to have a plain head"
    for name, off in _HEAD_SWITCHES.items():
        if (value := config.get(name)) is not None and value != off:
            return f"its loss is changed by {name} = {value}"
    return None


def disk_obstacle(config: dict[str, Any]) -> str | None:
    """Why a checkpoint with this config.json cannot be cut without transformers, None if it can."""
    fields, record = text_fields(config), family(config)
    kind = fields.get("model_type")
    if config.get("auto_map"):
        return "it brings its own code, and what that derives from the numbers of its layers is not known"
    if tensors := sliced_tensors(config):
        return f"{tensors[0][0]} holds a piece of every layer"
    if record.written_out is None:
        return f"what {kind} derives from the numbers of its layers is not known here"
    if str(kind).startswith("qwen") and "use_sliding_window" in fields and not fields["use_sliding_window"]:
        return None  # all layers alike
    missing = [name for name in record.written_out if fields.get(name) is None]
    return (
        f"config.json leaves {missing[0]} to transformers, which derives it from the layers' numbers"
        if missing
        else None
    )


def slice_config(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """The configuration of the model that keeps only the layers `kept` (ascending), from a config.json's dict.

    Every top-level list with one entry per layer is sliced (`layer_types`, `no_rope_layers`, ...); fields that name or
    count layers are rewritten so that each layer stays what it was.

    Raises:
        UserError: the configuration cannot say that of these layers; with the reason.
    """
    if isinstance(config.get("text_config"), dict):
        return {**config, "text_config": slice_config(config["text_config"], kept)}
    name, count = layer_count(config)
    # Some files keep the count under two names, and the one that stands last wins.
    sliced = config | {key: len(kept) for key in COUNT_FIELDS if key == name or config.get(key) == count}
    for key, value in config.items():
        if isinstance(value, list) and len(value) == count and key not in (*NOT_PER_LAYER, *_FIELDS):
            sliced[key] = [value[layer] for layer in kept]
    for key, rewrite in _FIELDS.items():
        if config.get(key):
            try:
                sliced |= rewrite(config, key, kept, count)
            except (TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
                raise UserError(
                    f"the configuration has {key} = {config[key]!r:.80}, which cannot be followed ({error!r:.80}); "
                    "give a checkpoint whose config.json is complete."
                ) from None
    if mtp_layers(config):
        sliced |= {key: 0 for key in MTP_FIELDS if key in config} or {MTP_FIELDS[0]: 0}
    forced, types = family(config).last_type, sliced.get("layer_types")
    if forced and types and types[-1] != forced:
        raise UserError(
            f"layer {kept[-1]} would be the last, of type {types[-1]}, and transformers makes the last one {forced}; "
            f"keep layer {count - 1}."
        )
    return sliced


def fixed_layers(config: dict[str, Any]) -> dict[int, str]:
    """The layers that cannot be taken out by themselves, each with the reason."""
    _, count = layer_count(text_fields(config))
    reasons = {}
    for layer in range(count):
        try:
            slice_config(config, [other for other in range(count) if other != layer])
        except UserError as error:
            reasons[layer] = str(error)
    return reasons


def check_set(config: dict[str, Any], removed: list[int]) -> None:
    """Refuse a set of layers that the configuration cannot lose together.

    Raises:
        UserError: with the reason.
    """
    _, count = layer_count(text_fields(config))
    slice_config(config, [layer for layer in range(count) if layer not in removed])


# ---- fields that depend on layer numbers: (configuration, field, kept layers, layers before) -> what changes


def _count_below(config: dict[str, Any], key: str, kept: list[int], _: int) -> dict[str, Any]:
    """The first so many layers are different: count those of them that stay."""
    return {key: sum(layer < config[key] for layer in kept)}


def _renumber(config: dict[str, Any], key: str, kept: list[int], _: int) -> dict[str, Any]:
    """A list of layer numbers."""
    return {key: [kept.index(layer) for layer in config[key] if layer in kept]}


def _repeat(config: dict[str, Any], key: str, kept: list[int], count: int) -> dict[str, Any]:
    """A list that is repeated until all layers have an entry: write it out."""
    whole = (list(config[key]) * count)[:count]
    return {key: [whole[layer] for layer in kept]}


def _sparse_step(config: dict[str, Any], key: str, kept: list[int], _: int) -> dict[str, Any]:
    """Every so many layers have experts, unless listed: list all that have none."""
    without = config.get("mlp_only_layers") or []
    if config[key] == 1 and not without:
        return {}
    dense = [new for new, old in enumerate(kept) if old in without or (old + 1) % config[key]]
    return {key: 1, "mlp_only_layers": dense}


def _period(config: dict[str, Any], key: str, kept: list[int], _: int) -> dict[str, Any]:
    """Layers of one kind stand at an offset in a period: find a period and an offset that say so of those that stay."""
    offset_key = key.replace("_period", "_offset")
    wanted = [layer % config[key] == config[offset_key] for layer in kept]
    # The old period first; beyond the number of layers stands for none of that kind.
    for period in (config[key], *range(1, len(kept) + 2)):
        for offset in range(period):
            if [layer % period == offset for layer in range(len(kept))] == wanted:
                return {key: period, offset_key: offset}
    kind = key.removesuffix("_period").replace("_", " ")
    raise UserError(
        f"without these layers the {kind}s would follow no fixed period any more, and {config.get('model_type')} can "
        f"say nothing else; remove whole periods of {config[key]} layers."
    )


def _shared_kv(config: dict[str, Any], key: str, kept: list[int], count: int) -> dict[str, Any]:
    """The last so many layers use the keys and values of the last layer of their type before them."""
    first, types = count - config[key], config["layer_types"]
    for kind in set(types[first:]):
        producer = max((layer for layer in range(first) if types[layer] == kind), default=None)
        if producer is not None and producer not in kept:
            raise UserError(f"layer {producer} makes the keys and values that later layers share; keep it.")
    return {key: sum(layer >= first for layer in kept)}


_FIELDS: dict[str, Callable[[dict[str, Any], str, list[int], int], dict[str, Any]]] = {
    "first_k_dense_replace": _count_below,
    "attn_layer_indices": _renumber,
    "moe_layers": _renumber,
    "block_types": _repeat,
    "decoder_sparse_step": _sparse_step,
    "mlp_only_layers": lambda *_: {},  # written by decoder_sparse_step
    "attn_layer_period": _period,
    "expert_layer_period": _period,
    "num_kv_shared_layers": _shared_kv,
}
