"""Builders of tiny models."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


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
