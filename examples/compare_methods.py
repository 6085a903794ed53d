"""Which layers would each method remove, and what would that cost: perplexity with those layers bypassed.

python examples/compare_methods.py [MODEL] [--text FILE] [--num-layers 2] [--methods trsp,sleb,shortgpt,last]

Nothing is trained or written. `trsp-fast compare` does the same with stage 2, several seeds and a page of its own.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trsp_fast as trsp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(Path(trsp.__file__).parent / "demo_model"))
    parser.add_argument("--text", default=argparse.__file__, help="to choose and to measure on; Python's argparse")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--methods", default="trsp,shortgpt,angular,last")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8")
    stream = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = stream[: len(stream) // arguments.length * arguments.length].view(-1, arguments.length)
    tokens, held_out = windows[: arguments.windows], windows[arguments.windows :][: arguments.windows]

    print(f"{'all layers on':>14}: perplexity {trsp.perplexity(model, held_out):.2f}")
    for method in arguments.methods.split(","):
        began = time.perf_counter()
        layers = trsp.select_layers(model, tokens, method, num_layers=arguments.num_layers)
        seconds = time.perf_counter() - began
        with trsp.bypassed(model, layers):
            print(f"{method:>14}: perplexity {trsp.perplexity(model, held_out):.2f} without {layers} ({seconds:.1f} s)")


if __name__ == "__main__":
    main()
