"""The pruned model is an ordinary one: tune it further (LoRA with `peft`, else all weights), then quantise it.

python examples/continue_after_the_cut.py [MODEL] [--layers 4,9] [--text FILE] [--steps 8] [--lr 1e-4]

What trsp_fast does ends with the cut. Stage 2 has spent its tokens before it; this is for tokens that are spent after.
"""

import argparse
import importlib.util
import io
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trsp_fast as trsp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(Path(trsp.__file__).parent / "demo_model"))
    parser.add_argument("--layers", default="4,9", help="to cut out")
    parser.add_argument("--text", default=argparse.__file__, help="to tune and to measure on; Python's argparse")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8")
    stream = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = stream[: len(stream) // arguments.length * arguments.length].view(-1, arguments.length)
    tokens, held_out = windows[: arguments.windows], windows[arguments.windows :][: arguments.windows]

    print(f"dense: perplexity {trsp.perplexity(model, held_out):.2f}")
    small = trsp.remove_layers(model, [int(layer) for layer in arguments.layers.split(",")])
    print(f"cut: perplexity {trsp.perplexity(small, held_out):.2f}")
    small = tuned(small, tokens, arguments.steps, arguments.lr)
    print(f"tuned: perplexity {trsp.perplexity(small, held_out):.2f}, {megabytes(small):.2f} MB")
    quantised = in_int8(small)
    if quantised is not None:
        figures = f"perplexity {trsp.perplexity(quantised, held_out):.2f}, {megabytes(quantised):.2f} MB"
        print(f"linear layers in int8: {figures}")


def tuned(model: torch.nn.Module, tokens: torch.Tensor, steps: int, lr: float) -> torch.nn.Module:
    """The model after some steps on the text, by LoRA where `peft` is installed; a merged, ordinary model again."""
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig, get_peft_model

        trained = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    else:
        print("peft is not installed, so all weights are tuned; `pip install peft` for LoRA.")
        trained = model.requires_grad_(True)
    weights = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    print(f"tuning {sum(weight.numel() for weight in weights):,} weights")
    optimizer = torch.optim.AdamW(weights, lr=lr)
    trained.train()
    for step in range(steps):
        batch = tokens[torch.arange(4 * step, 4 * step + 4) % len(tokens)]
        loss = trained(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    merged = trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained
    return merged.eval().requires_grad_(False)


def in_int8(model: torch.nn.Module) -> torch.nn.Module | None:
    """Linear layers with weights in int8 and inputs quantised as they come, for a CPU; None where torch cannot."""
    try:
        from torch.ao.quantization import quantize_dynamic

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is on its way to the package torchao
            return quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    except (ImportError, RuntimeError) as error:
        print(f"this torch does not quantise ({error}); the package torchao does.")
        return None


def megabytes(model: torch.nn.Module) -> float:
    """What the weights take when saved, each tensor once."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell() / 1e6


if __name__ == "__main__":
    main()
