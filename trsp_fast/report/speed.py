"""Speed of a model as it is used: reading a prompt, and generating with a KV cache."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

PROMPT, NEW_TOKENS, BATCH, REPEATS = 64, 32, 8, 3


@torch.no_grad()
def measure_speed(models: dict[str, PreTrainedModel]) -> dict[str, dict[str, float]]:
    """Tokens per second of each model, interleaved in one process so that a noisy machine hits all alike.

    Returns:
        By model: `prompt_tokens_per_second` and `generated_tokens_per_second` (medians of 3 after a warm-up; batch 8,
        64 prompt tokens, 32 new ones), and `parameters`.
    """
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repeat in range(REPEATS + 1):
        for name, model in models.items():
            measured = _rates(model)
            if repeat:
                rates[name].append(measured)
    return {
        name: {
            "prompt_tokens_per_second": statistics.median(prompt for prompt, _ in rates[name]),
            "generated_tokens_per_second": statistics.median(generated for _, generated in rates[name]),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        for name, model in models.items()
    }


@torch.no_grad()
def seconds_of_a_round(model: PreTrainedModel) -> float:
    """What one round of `measure_speed` takes for a model; there are `REPEATS` + 1 of them."""
    began = time.perf_counter()
    _rates(model)
    return time.perf_counter() - began


def _rates(model: PreTrainedModel) -> tuple[float, float]:
    """Tokens per second of one prompt pass and of one generation that includes its own prompt pass."""
    device = next(model.parameters()).device
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 4096
    length = min(PROMPT, context // 2)
    new = min(NEW_TOKENS, context - length)
    tokens = torch.ones(BATCH, length, dtype=torch.long, device=device)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    options |= {"attention_mask": torch.ones_like(tokens), "num_beams": 1, "min_new_tokens": new}

    def seconds(work: Callable[[], Any]) -> float:
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - began

    prompt = seconds(lambda: model(input_ids=tokens, use_cache=False))
    generated = seconds(lambda: model.generate(tokens, max_new_tokens=new, **options))
    return BATCH * length / prompt, BATCH * new / generated


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
