"""Tiny random models of every family that is tried, their configurations set so that the traps are really there.

A row is a family's name and its configuration; it is made when asked for, because some classes are younger than the
oldest supported transformers. CONTRIBUTING.md says how to add one.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel

LAYERS = 8
PLAIN: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GATED_MLP = {**PLAIN, "intermediate_size": 48, "num_key_value_heads": 2}
GPT2_STYLE: dict[str, Any] = {
    "vocab_size": 97, "n_embd": 32, "n_head": 4, "n_layer": LAYERS, "n_positions": 64, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FALCON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": LAYERS,
    "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Dense layers by a list and by a step at once.
SPARSE = {**EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": [3, 5]}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DENSE_FIRST = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 3,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}  # fmt: skip
LINEAR = {
    "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
# Without a period, so that a cut shows.
SHORT = [
    f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full", "sliding", "sliding", "full")
]
SLIDING = {"sliding_window": 6, "layer_types": SHORT}
QWEN_SLIDING = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3}
PER_LAYER = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 3}
ROPES = [1, 1, 0, 1, 0, 1, 1, 0]

ZOO: dict[str, Callable[[], Any]] = {
    "apertus": lambda: hf.ApertusConfig(**GATED_MLP),
    "arcee": lambda: hf.ArceeConfig(**GATED_MLP),
    "bamba": lambda: hf.BambaConfig(**GATED_MLP, **MAMBA, attn_layer_indices=[2, 5]),
    "biogpt": lambda: hf.BioGptConfig(**PLAIN, intermediate_size=48),
    "bloom": lambda: hf.BloomConfig(
        vocab_size=97, hidden_size=32, n_head=4, n_layer=LAYERS, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    ),
    "codegen": lambda: hf.CodeGenConfig(**GPT2_STYLE, n_ctx=64, rotary_dim=4),
    "cohere": lambda: hf.CohereConfig(**GATED_MLP),
    "cohere2": lambda: hf.Cohere2Config(**GATED_MLP, **SLIDING, head_dim=8),
    "deepseek-v2": lambda: hf.DeepseekV2Config(**GATED_MLP | LATENT | DENSE_FIRST),
    "deepseek-v3": lambda: hf.DeepseekV3Config(**GATED_MLP | LATENT | DENSE_FIRST),
    "ernie4.5": lambda: hf.Ernie4_5Config(**GATED_MLP, head_dim=8),
    "exaone4": lambda: hf.Exaone4Config(**GATED_MLP, **SLIDING),
    "falcon": lambda: hf.FalconConfig(**FALCON),
    "falcon, alibi": lambda: hf.FalconConfig(**FALCON, alibi=True, multi_query=False),
    "falcon, new": lambda: hf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "falcon-h1": lambda: hf.FalconH1Config(**GATED_MLP, **MAMBA, head_dim=8, mamba_d_ssm=64),
    "gemma": lambda: hf.GemmaConfig(**GATED_MLP, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**GATED_MLP, **SLIDING, head_dim=8, query_pre_attn_scalar=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**GATED_MLP, **SLIDING, head_dim=8, query_pre_attn_scalar=8),
    "gemma3, vision": lambda: hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**GATED_MLP, **SLIDING, head_dim=8, query_pre_attn_scalar=8).to_dict(),
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS,
                       "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1, image_token_index=96, boi_token_index=95, eoi_token_index=94,
    ),
    "gemma3n": lambda: hf.Gemma3nTextConfig(
        **GATED_MLP, **SLIDING, **PER_LAYER, head_dim=8, laurel_rank=4, altup_num_inputs=2,
        activation_sparsity_pattern=[0.9, 0.9, *[0.0] * 6],
    ),
    "gemma4": lambda: hf.Gemma4TextConfig(**GATED_MLP, **SLIDING, **PER_LAYER, head_dim=8, global_head_dim=8),
    "glm": lambda: hf.GlmConfig(**GATED_MLP, head_dim=8),
    "glm4": lambda: hf.Glm4Config(**GATED_MLP, head_dim=8),
    "glm4-moe": lambda: hf.Glm4MoeConfig(**GATED_MLP, **DENSE_FIRST, head_dim=8),
    "gpt-bigcode": lambda: hf.GPTBigCodeConfig(**GPT2_STYLE),
    "gpt-j": lambda: hf.GPTJConfig(**GPT2_STYLE, rotary_dim=4),
    "gpt-neo": lambda: hf.GPTNeoConfig(
        vocab_size=97, hidden_size=32, num_heads=4, num_layers=LAYERS, max_position_embeddings=64, window_size=6,
        attention_types=[[["global", "local"], 4]], initializer_range=0.2, bos_token_id=0, eos_token_id=0,
        intermediate_size=48,
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**PLAIN, intermediate_size=48),
    "gpt-oss": lambda: hf.GptOssConfig(**GATED_MLP, **LOCAL_EXPERTS, **SLIDING, head_dim=8),
    "gpt2": lambda: hf.GPT2Config(**GPT2_STYLE),
    "granite": lambda: hf.GraniteConfig(
        **GATED_MLP, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=2.0, embedding_multiplier=3.0
    ),
    "granite-hybrid": lambda: hf.GraniteMoeHybridConfig(
        **GATED_MLP, **LOCAL_EXPERTS, **MAMBA, shared_intermediate_size=16, mamba_expand=2,
        layer_types=["mamba", "attention", "mamba", "attention", "mamba", "mamba", "attention", "mamba"],
    ),
    "granite-moe": lambda: hf.GraniteMoeConfig(**GATED_MLP, **LOCAL_EXPERTS),
    "helium": lambda: hf.HeliumConfig(**GATED_MLP, head_dim=8),
    "hunyuan": lambda: hf.HunYuanDenseV1Config(**GATED_MLP, head_dim=8),
    "jamba": lambda: hf.JambaConfig(
        **GATED_MLP, use_mamba_kernels=False, num_experts=2, mamba_dt_rank=4, attn_layer_period=4, attn_layer_offset=2,
        expert_layer_period=2, expert_layer_offset=1,
    ),
    "lfm2": lambda: hf.Lfm2Config(
        **GATED_MLP, layer_types=["conv", "conv", "full_attention", "conv", "full_attention", "conv", "conv",
                                  "full_attention"],
    ),
    "llama": lambda: hf.LlamaConfig(**GATED_MLP, rope_theta=500000.0),
    "llama4": lambda: hf.Llama4TextConfig(
        **GATED_MLP, intermediate_size_mlp=48, head_dim=8, num_local_experts=2, interleave_moe_layer_step=2,
        no_rope_layers=[1, 1, 1, 0] * 2, attention_chunk_size=6,
        layer_types=[*["chunked_attention"] * 3, "full_attention"] * 2,
    ),
    "mamba": lambda: hf.MambaConfig(
        vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=LAYERS, initializer_range=0.2, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    ),
    "mamba2": lambda: hf.Mamba2Config(
        vocab_size=97, hidden_size=32, state_size=8, num_heads=8, head_dim=8, n_groups=1, num_hidden_layers=LAYERS,
        initializer_range=0.2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
    "minimax": lambda: hf.MiniMaxConfig(
        **GATED_MLP, **LOCAL_EXPERTS, head_dim=8, layer_types=["linear_attention", "full_attention"] * 4
    ),
    "ministral": lambda: hf.MinistralConfig(**GATED_MLP, **SLIDING, head_dim=8),
    "mistral": lambda: hf.MistralConfig(**GATED_MLP, sliding_window=6),
    "mixtral": lambda: hf.MixtralConfig(**GATED_MLP, **LOCAL_EXPERTS, sliding_window=None),
    "mpt": lambda: hf.MptConfig(
        vocab_size=97, d_model=32, n_heads=4, n_layers=LAYERS, max_seq_len=64, expansion_ratio=2, initializer_range=0.2
    ),
    "nemotron": lambda: hf.NemotronConfig(**GATED_MLP),
    "olmo": lambda: hf.OlmoConfig(**GATED_MLP),
    "olmo2": lambda: hf.Olmo2Config(**GATED_MLP),
    "olmo3": lambda: hf.Olmo3Config(**GATED_MLP, **SLIDING),
    "olmoe": lambda: hf.OlmoeConfig(**GATED_MLP, num_experts=4, num_experts_per_tok=2),
    "opt": lambda: hf.OPTConfig(**PLAIN, ffn_dim=48, word_embed_proj_dim=32),
    "opt, 350m": lambda: hf.OPTConfig(**PLAIN, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False),
    "persimmon": lambda: hf.PersimmonConfig(**PLAIN, intermediate_size=48),
    "phi": lambda: hf.PhiConfig(**PLAIN, intermediate_size=48),
    "phi3": lambda: hf.Phi3Config(**GATED_MLP, sliding_window=6),
    "qwen2": lambda: hf.Qwen2Config(**GATED_MLP, **QWEN_SLIDING),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(**GATED_MLP, **SPARSE, shared_expert_intermediate_size=16),
    "qwen3": lambda: hf.Qwen3Config(**GATED_MLP, **QWEN_SLIDING, head_dim=8),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**GATED_MLP, **SPARSE, head_dim=8),
    "qwen3-next": lambda: hf.Qwen3NextConfig(**GATED_MLP, **SPARSE, **LINEAR, shared_expert_intermediate_size=16),
    "qwen3.5": lambda: hf.Qwen3_5TextConfig(**GATED_MLP, **LINEAR),
    "recurrent-gemma": lambda: hf.RecurrentGemmaConfig(
        **{k: v for k, v in GATED_MLP.items() if k != "max_position_embeddings"}, lru_width=32,
        attention_window_size=6, block_types=["recurrent", "recurrent", "attention"],
    ),
    "rwkv": lambda: hf.RwkvConfig(
        vocab_size=97, hidden_size=32, attention_hidden_size=32, num_hidden_layers=LAYERS, context_length=64
    ),
    "seed-oss": lambda: hf.SeedOssConfig(**GATED_MLP, head_dim=8),
    "smollm3": lambda: hf.SmolLM3Config(
        **GATED_MLP, **SLIDING, no_rope_layers=ROPES, use_sliding_window=True
    ),
    "stablelm": lambda: hf.StableLmConfig(**GATED_MLP),
    "starcoder2": lambda: hf.Starcoder2Config(**GATED_MLP, sliding_window=6),
    "xglm": lambda: hf.XGLMConfig(
        vocab_size=97, d_model=32, num_layers=LAYERS, attention_heads=4, ffn_dim=48, max_position_embeddings=64,
        init_std=0.2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
}  # fmt: skip
# The first, third and last of these sets are tried where layers cannot go one by one.
SETS = {
    "jamba": [[0], [0, 1, 2, 3], [7]],
    "gemma3n": [[0], [1, 2, 6], [7]],
    "gemma4": [[0], [1, 2, 6], [6]],
}
DEFAULT_SETS = [[0], [1, 4, 6], [7]]
CORE = ["llama", "mistral", "qwen2", "qwen3", "opt", "opt, 350m", "phi", "gpt2", "gpt-neox"]


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of a family, 8 layers, in evaluation mode."""
    torch.manual_seed(seed)
    return hf.AutoModelForCausalLM.from_config(ZOO[name]()).eval()


def padded() -> dict[str, torch.Tensor]:
    """Token ids and mask of three sequences of different lengths, padded on the left."""
    tokens = torch.randint(1, 90, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 2, 5)):
        tokens[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}
