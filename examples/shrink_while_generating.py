"""Cut layers out of a model and of its KV cache in the middle of a text, and go on where it was.

python examples/shrink_while_generating.py [MODEL] [--layers 2,4,9]

The first half is generated with the layers bypassed, the second by the cut model from the same cache. The text is the
one that the bypassed model would have written, and it grows past what the cache could hold before the cut.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trsp_fast as trsp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(Path(trsp.__file__).parent / "demo_model"))
    parser.add_argument("--layers", default="2,4,9", help="to cut out")
    parser.add_argument("--prompt", default="import os\n\ndef main():\n")
    parser.add_argument("--capacity", type=int, default=48, help="tokens that the cache holds before the cut")
    arguments = parser.parse_args()
    layers = [int(layer) for layer in arguments.layers.split(",")]

    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    prompt = tokenizer(arguments.prompt, return_tensors="pt").input_ids
    cache = trsp.SlabCache(model.config, max_len=arguments.capacity)

    with trsp.bypassed(model, layers):
        text = write(model, prompt, arguments.capacity - 8, cache)
        print(f"{text.shape[1]} tokens with layers {layers} bypassed; the cache holds {cache.max_len} in {size(cache)}")

    model_of_before, model = model, trsp.remove_layers(model, layers)
    cache.drop_layers(layers)
    print(f"layers dropped: {cache.free_bytes:,} bytes are free, none was moved")
    cache.regrid(max_len=cache.longest())
    print(f"the same {size(cache)} hold {cache.max_len} tokens now")

    text = write(model, text, cache.max_len, cache)
    print(f"{text.shape[1]} tokens, the last of them by the cut model:\n{tokenizer.decode(text[0])}")

    with trsp.bypassed(model_of_before, layers):
        never_cut = write(model_of_before, prompt, text.shape[1], None)
    print("identical to never having cut:", torch.equal(text, never_cut))


def write(model: torch.nn.Module, text: torch.Tensor, tokens: int, cache: trsp.SlabCache | None) -> torch.Tensor:
    """`text` continued greedily until it has this many tokens."""
    more = tokens - text.shape[1]
    options = {"max_new_tokens": more, "min_new_tokens": more, "do_sample": False, "pad_token_id": 0}
    if cache is None:
        return model.generate(text, use_cache=False, **options)
    return model.generate(text, past_key_values=cache, **options)


def size(cache: trsp.SlabCache) -> str:
    return f"{cache.nbytes:,} bytes"


if __name__ == "__main__":
    main()
