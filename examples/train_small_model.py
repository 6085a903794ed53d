"""Train a small model of another family on Python's own standard library, to measure pruners on.

    python examples/train_small_model.py --family gpt2 --layers 8 --width 64 --out build/gpt2-8
    python examples/train_small_model.py --family llama --layers 16 --width 384 --batch 64 --steps 6000 --out build/l16

Tokenizer and text are those of the demo model (train_demo_model.py). On a GPU it computes in bfloat16 there.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from train_demo_model import CONTEXT, VOCABULARY, held_out_perplexity, token_stream, train, train_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from trsp_fast.data import corpus_digest, standard_library

FAMILIES = ("gpt2", "llama", "qwen3")


def configuration(family: str, layers: int, width: int) -> PretrainedConfig:
    """A form of `family` with heads of 32 dimensions and tied embeddings."""
    ends = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    heads = width // 32
    if family == "gpt2":
        return GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            n_positions=CONTEXT,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            **ends,
        )
    kind = LlamaConfig if family == "llama" else Qwen3Config
    return kind(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **ends,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--stop-after", type=int, help="end after this many steps of the full schedule")
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.width % 32:
        parser.error(f"--width is {arguments.width}; give a multiple of 32, since heads have 32 dimensions.")
    torch.set_num_threads(arguments.threads)

    texts = standard_library("train")
    tokenizer = train_tokenizer(texts)
    stream = token_stream(tokenizer, texts)
    held_out = token_stream(tokenizer, standard_library("held-out"))
    torch.manual_seed(arguments.seed)
    model = AutoModelForCausalLM.from_config(configuration(arguments.family, arguments.layers, arguments.width))
    model.to(arguments.device)
    print(f"{model.num_parameters():,} parameters, {len(stream):,} training tokens, {len(held_out):,} held out")

    began, steps = time.perf_counter(), arguments.stop_after or arguments.steps
    half = arguments.device != "cpu"
    losses = train(model, stream, steps, arguments.steps, arguments.seed, arguments.batch, half)
    seconds = round(time.perf_counter() - began)
    model = model.to(torch.bfloat16)  # what is evaluated is what is saved
    record = {
        "corpus_sha256": corpus_digest(texts),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": arguments.device,
        "steps": steps,
        "tokens": steps * arguments.batch * CONTEXT,
        "seconds": seconds,
        "last_losses": losses[-20:],
        "held_out_perplexity": held_out_perplexity(model.float(), held_out),
    }
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"held-out perplexity {record['held_out_perplexity']:.2f}, written to {arguments.out}")


if __name__ == "__main__":
    main()
