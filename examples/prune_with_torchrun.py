"""Several processes share one pruning run: each GPU, or core, computes its part of every batch.

torchrun --nproc-per-node 2 examples/prune_with_torchrun.py OUT_FOLDER [MODEL] [--text FILE] [--num-layers 2]

Every process calls `prune` with the same model, tokens and configuration. The first one alone proves, writes and
reports. Without torchrun it is one process, with the same result up to rounding.
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trsp_fast as trsp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("model", nargs="?", default=str(Path(trsp.__file__).parent / "demo_model"))
    parser.add_argument("--text", default=argparse.__file__, help="to calibrate and to measure on; Python's argparse")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--epochs", type=int, default=1, help="of stage 2")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8")
    stream = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = stream[: len(stream) // arguments.length * arguments.length].view(-1, arguments.length)
    tokens, held_out = windows[: arguments.windows], windows[arguments.windows :][: arguments.windows]

    values = {"num_layers": arguments.num_layers, "transfer": {"epochs": arguments.epochs}}
    config = trsp.TRSPConfig.from_dict(values)
    result = trsp.prune(model, tokens, config, out=arguments.out, evaluation=held_out, tokenizer=tokenizer)
    if os.environ.get("RANK", "0") == "0":
        print(f"{result.report['run']['processes']} processes removed layers {result.removed_layers}")
        print(f"perplexity {result.perplexity['dense']:.2f} before, {result.perplexity['pruned']:.2f} after")
        print(f"checkpoint: {arguments.out}")


if __name__ == "__main__":
    main()
