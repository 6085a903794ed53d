"""Train the demo model: a 12-layer, 2.7 M parameter Llama on Python's own standard library.

    python examples/train_demo_model.py --out trsp_fast/demo_model      # 40-60 minutes on two cores

Deterministic for a given interpreter, torch build and thread count: the training files come from the interpreter that
runs this script (see `trsp_fast.data.standard_library`), every random choice from one seeded generator.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trsp_fast.data import corpus_digest, standard_library

VOCABULARY, CONTEXT, BATCH = 2048, 256, 16
PEAK_LR, WARMUP, WEIGHT_DECAY, CLIP = 2e-3, 100, 0.1, 1.0
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text round-trips, no unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One int64 stream: the files in order, each closed by the end-of-text token."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids.extend(encoding.ids)
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def build_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(
    model: PreTrainedModel,
    stream: torch.Tensor,
    steps: int,
    total: int,
    seed: int,
    windows: int = BATCH,
    half: bool = True,
) -> list[float]:
    """AdamW with warm-up and linear decay over `total` steps, of which the first `steps` are run; the loss of each.

    `half` multiplies in bfloat16, which processors without instructions for it do slowly.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)
    rising = min(WARMUP, total // 2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1, rising), (total - step) / (total - rising))
    )
    window = torch.arange(CONTEXT)
    losses, began = [], time.perf_counter()
    model.train()
    for step in range(steps):
        starts = torch.randint(len(stream) - CONTEXT, (windows, 1), generator=generator)
        batch = stream[starts + window].to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            speed = windows * CONTEXT * (step + 1) / (time.perf_counter() - began)
            print(f"step {step + 1}/{steps}  loss {sum(losses[-50:]) / 50:.3f}  {speed:,.0f} tokens/s", flush=True)
    return losses


@torch.no_grad()
def held_out_perplexity(model: PreTrainedModel, stream: torch.Tensor) -> float:
    model.eval()
    windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    batches = windows.to(model.device).split(BATCH)
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in batches]
    return math.exp(sum(losses) / len(windows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4300, help="4300 are 17.6 M tokens, five passes")
    parser.add_argument("--stop-after", type=int, help="end after this many steps of the full schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-evaluation", action="store_true", help="do not measure held-out perplexity at the end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a quarter of the speed, changes nothing here

    texts = standard_library("train")
    tokenizer = train_tokenizer(texts)
    stream = token_stream(tokenizer, texts)
    held_out = token_stream(tokenizer, standard_library("held-out"))
    model = build_model(arguments.seed)
    print(f"{model.num_parameters():,} parameters, {len(stream):,} training tokens, {len(held_out):,} held out")

    began = time.perf_counter()
    losses = train(model, stream, arguments.stop_after or arguments.steps, arguments.steps, arguments.seed)
    record = {
        "corpus_sha256": corpus_digest(texts),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": arguments.threads,
        "steps": len(losses),
        "tokens": len(losses) * BATCH * CONTEXT,
        "seconds": round(time.perf_counter() - began),
        "first_losses": losses[:20],
    }
    model = model.to(torch.bfloat16)  # what is evaluated is what is saved
    if not arguments.skip_evaluation:
        record["held_out_perplexity"] = held_out_perplexity(model.float(), held_out)
        print(f"held-out perplexity {record['held_out_perplexity']:.2f}")
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
