"""Published models by name with random weights: speed and memory depend on the shapes only, so nothing is fetched."""

import torch
from transformers import PreTrainedModel

from trsp_fast.errors import UserError
from trsp_fast.models.free_memory import free_memory

# name -> (transformers' configuration class, its fields); `tiny` is for tests
SHAPES: dict[str, tuple[str, dict[str, int]]] = {
    "llama2-7b": ("LlamaConfig", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                                  "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096}),
    "llama2-13b": ("LlamaConfig", {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                                   "num_attention_heads": 40, "vocab_size": 32000, "max_position_embeddings": 4096}),
    "llama3-8b": ("LlamaConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                  "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                                  "max_position_embeddings": 8192}),
    "opt-2.7b": ("OPTConfig", {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
                               "num_attention_heads": 32, "vocab_size": 50272, "word_embed_proj_dim": 2560,
                               "max_position_embeddings": 2048}),
    "opt-13b": ("OPTConfig", {"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40,
                              "num_attention_heads": 40, "vocab_size": 50272, "word_embed_proj_dim": 5120,
                              "max_position_embeddings": 2048}),
    "phi-2": ("PhiConfig", {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
                            "num_attention_heads": 32, "vocab_size": 51200, "max_position_embeddings": 2048}),
    "tiny": ("LlamaConfig", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
                             "num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 64}),
}  # fmt: skip


def random_model(shape: str, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a published shape, made on the device, in evaluation mode; the same weights every time.

    Raises:
        UserError: no such shape, or its weights do not fit into the device's free memory.
    """
    with torch.device("meta"):
        empty = _made(shape, dtype)
    parameters = sum(p.numel() for p in empty.parameters())
    needed, free = parameters * dtype.itemsize, free_memory(device)
    if needed > free:
        raise UserError(
            f"shape {shape!r} needs {needed / 1e9:.1f} GB for its weights in {str(dtype).removeprefix('torch.')}, "
            f"{free / 1e9:.1f} GB are free; give a smaller shape or another --device."
        )
    torch.manual_seed(0)
    with torch.device(device):
        return _made(shape, dtype).eval()


def _made(shape: str, dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    if shape not in SHAPES:
        raise UserError(f"shape {shape!r} is unknown; give one of {', '.join(SHAPES)}.")
    kind, fields = SHAPES[shape]
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields), dtype=dtype)
