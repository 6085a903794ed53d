"""Gates in a training loop of your own: learn them, read what the layers do, take out the weakest, compare.

python examples/own_training_loop.py [MODEL] [--text FILE] [--remove 2] [--steps 4] [--windows 16] [--length 128]

Everything that `trsp_fast.prune` does beyond this is left to you here: the loss, the optimiser, the order of the data.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trsp_fast as trsp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(Path(trsp.__file__).parent / "demo_model"))
    parser.add_argument("--text", default=argparse.__file__, help="to learn and to measure on; Python's argparse")
    parser.add_argument("--remove", type=int, default=2, help="layers to take out")
    parser.add_argument("--steps", type=int, default=4, help="of the gates before each choice")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = Path(arguments.text).read_text(encoding="utf-8")
    stream = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    windows = stream[: len(stream) // arguments.length * arguments.length].view(-1, arguments.length)
    tokens, held_out = windows[: arguments.windows], windows[arguments.windows :][: arguments.windows]

    removed: list[int] = []
    with trsp.LayerGates(model, mode="residual") as gates:
        while len(removed) < arguments.remove:
            strength = curvature(model, gates, tokens, arguments.steps)
            alive = [layer for layer in gates.layers if layer not in removed]
            weakest = min(alive, key=lambda layer: float(strength[layer]))
            print(f"layer {weakest} goes: gate {gates.values[weakest].item():.3f}, curvature {strength[weakest]:.1e}")
            removed.append(weakest)
            gates.bypass([weakest])  # from here on it is the identity, and costs nothing
        with gates.neutral():
            bypassed = trsp.perplexity(model, held_out)
    small = trsp.remove_layers(model, removed)  # around the same weights: no copy
    print(f"perplexity with all {len(gates.layers)} layers: {trsp.perplexity(model, held_out):.2f}")
    print(f"perplexity without {sorted(removed)}: {trsp.perplexity(small, held_out):.2f}, bypassed {bypassed:.2f}")


def curvature(model: torch.nn.Module, gates: trsp.LayerGates, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    """Move the gates for some steps; the mean squared gradient of the loss in each, over all sequences."""
    optimizer = torch.optim.Adam([gates.values], lr=1e-2)
    total = torch.zeros_like(gates.values)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss = loss + 5e-4 * gates.values.abs().sum()
        loss.backward()
        each = gates.gradients() * len(tokens)  # one row per sequence, of the loss of that sequence
        total += each.square().mean(0)
        optimizer.step()
    return total / steps


if __name__ == "__main__":
    main()
