"""Builders of tiny models."""

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)


def tiny_llama(layers: int = 6, seed: int = 0, **changes) -> LlamaForCausalLM:
    """A random Llama whose layers matter: initialised ten times wider than usual."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GATED_MLP = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}

FAMILIES = {
    "llama": LlamaConfig(**GATED_MLP, rope_theta=500000.0),
    "mistral": MistralConfig(**GATED_MLP, sliding_window=6),
    "qwen2": Qwen2Config(**GATED_MLP, **SLIDING),
    "qwen3": Qwen3Config(**GATED_MLP, **SLIDING, head_dim=8),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "opt-350m-style": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi": PhiConfig(**SMALL, intermediate_size=48),
    "gpt2": GPT2Config(
        vocab_size=97,
        n_embd=32,
        n_head=4,
        n_layer=8,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "gpt-neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of one of FAMILIES, 8 layers."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(FAMILIES[name]).eval()
