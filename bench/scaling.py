"""Memory and time of a run by the size of its model and the number of its processes: the tables of docs/scaling.md.

`python bench/scaling.py` prints them. The bytes are checked against what small runs hold, and send where weights are
divided, in tests/engine/test_distributed.py and test_fsdp.py; the rest is arithmetic from the assumptions below, not a
measurement.
"""

import math
from dataclasses import dataclass

from trsp_fast.plan import CLOSE, LOOKS, PIECE
from trsp_fast.select.race import FIRST
from trsp_fast.select.stand_in import fitted_windows

FP32 = 4
GRADIENT, MOMENTS = FP32, 2 * FP32  # of each trained weight; AdamW has two moments
COMPUTE = 2  # bf16
COUNTER = FP32  # AdamW counts the steps of every tensor by itself

# Assumed: a GPU of 989 TFLOP/s in bf16 (H100 SXM, dense), 40% of them used; links of 450 GB/s inside a node (NVLink)
# and 50 GB/s per GPU between nodes (400 Gb/s), 80% of them used.
FLOPS, USED = 989e12, 0.4
NVLINK, NETWORK, LINK_USED = 450e9, 50e9, 0.8
GPUS_PER_NODE = 8

# The default recipe: see trsp_fast.config, and BATCH in trsp_fast.select.trsp
WINDOW, SAMPLES, EPOCHS, SHARE = 2048, 128, 3, 0.25
SELECT_BATCH, STEPS_PER_ROUND, SHORTLIST, TRANSFER_BATCH = 16, 1, 16, 4


@dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    layers: int
    outside: float  # parameters of embeddings and head


MODELS = (
    Model("LLaMA2-7B", 6.74e9, 32, 2 * 32000 * 4096),
    Model("LLaMA2-13B", 13.0e9, 40, 2 * 32000 * 5120),
    Model("Llama-3-70B", 70.6e9, 80, 2 * 128256 * 8192),
    Model("Llama-3.1-405B", 405.9e9, 126, 2 * 128256 * 16384),
)


def select_bytes(parameters: float, compute: int = COMPUTE) -> float:
    """Weights in stage 1, which are frozen: no gradients, no optimiser. Gates are a few bytes per layer."""
    return parameters * compute


def transfer_bytes(
    parameters: float, trained: float, tensors: int = 0, *, distill: bool = True, compute: int = COMPUTE
) -> float:
    """Weights, gradients, AdamW and teacher in stage 2, in each process.

    `trained` weights in `tensors` tensors are fp32 with gradients and moments, and the teacher has copies of them in
    the dtype of the computation; the others stay in that dtype and are shared with the teacher.
    """
    teacher = trained * compute if distill else 0
    own = trained * (FP32 + GRADIENT + MOMENTS) + tensors * COUNTER
    return own + (parameters - trained) * compute + teacher


def cast_bytes(parameters: float, compute: int = COMPUTE) -> float:
    """What autocast adds during a step: a copy of every weight in the dtype of the computation, kept for backward."""
    return parameters * compute


def sharded(size: float, processes: int) -> float:
    """The same bytes in each process, where every tensor is divided among the processes (`run.parallel: fsdp`).

    Rows that do not divide evenly make it more by less than one row of each tensor. On top come whole layers: the one
    at work and the next one, which is gathered meanwhile (`layer_bytes`).
    """
    return size / processes


def layer_bytes(model: "Model", compute: int = COMPUTE) -> float:
    """Of a divided model: two layers and the embeddings and the head, gathered in the dtype of the computation.

    Of the layer in its backward pass there are gradients beside the weights, and fp32 ones on their way.
    """
    layer = (model.parameters - model.outside) / model.layers
    return 2 * layer * compute + layer * (compute + FP32) + model.outside * (2 * compute + FP32)


def transfer_steps(processes: int) -> int:
    """Optimiser steps of stage 2 with a window for each process."""
    return math.ceil(EPOCHS * SAMPLES / max(TRANSFER_BATCH, processes))


def flops(model: Model, processes: int, divided: bool = False) -> tuple[float, float]:
    """Floating point operations of stage 1 and of stage 2.

    Per token and parameter 2 for a forward pass, 2 for the gradient of activations and 2 for that of weights. Stage 1
    has frozen weights: 4, and 2 for its races, a shortlist on a few windows and two layers on all of them, of which
    what lies below a candidate runs once; for the second look, a few layers on all windows half as often; and for the
    windows that folds are fitted to, once a round and a look, and once for each other layer that is folded anew there.
    Stage 2: 6, and 2 for the teacher. With divided weights every layer is recomputed, 2 more in both, races take whole
    passes, and nothing is folded.
    """
    again, piece, fitted = (2, 1.0, 0) if divided else (0, PIECE, fitted_windows(SAMPLES))
    rounds = round(model.layers * SHARE)
    judging, looks = SAMPLES - fitted, LOOKS * (rounds - 1)
    learned = rounds * STEPS_PER_ROUND * max(SELECT_BATCH, processes) * WINDOW
    raced = piece * (rounds * (SHORTLIST * FIRST + 2 * judging) + looks * CLOSE * judging) * WINDOW
    raced += fitted * (rounds + looks * (1 + rounds / 2)) * WINDOW
    trained = EPOCHS * SAMPLES * WINDOW
    return model.parameters * ((4 + again) * learned + 2 * raced), model.parameters * (8 + again) * trained


def reduced_bytes(model: Model, processes: int) -> float:
    """Bytes that each process sends in one step of stage 2: a ring all-reduce of fp32 gradients."""
    return 2 * (processes - 1) / processes * model.parameters * GRADIENT


def gathered_bytes(parameters: float, processes: int, compute: int = COMPUTE) -> float:
    """The same with divided weights: two gathers of the weights, the teacher's one, a scatter of fp32 gradients.

    For one pass: a step with more windows than processes takes several.
    """
    return (processes - 1) / processes * parameters * (3 * compute + GRADIENT)


def hours(model: Model, processes: int, sent: float, divided: bool = False) -> tuple[float, float]:
    """Of stage 1 and of stage 2, of which `sent` bytes a step are not hidden behind computing.

    Divided weights are gathered in stage 1 too: twice a pass of its steps, once a pass of its races, 16 windows each.
    """
    first, second = (work / (processes * FLOPS * USED) for work in flops(model, processes, divided))
    link = (NVLINK if processes <= GPUS_PER_NODE else NETWORK) * LINK_USED
    if divided:
        rounds, heat = round(model.layers * SHARE), -(-SAMPLES // processes // 16)
        passes = rounds * 2 * STEPS_PER_ROUND * -(-SELECT_BATCH // processes)
        passes += rounds * (SHORTLIST * -(-FIRST // processes // 16) + 2 * heat) + LOOKS * (rounds - 1) * CLOSE * heat
        first += passes * (processes - 1) / processes * model.parameters * COMPUTE / link
    return first / 3600, (second + transfer_steps(processes) * sent / link) / 3600


def main() -> None:
    print("| model | stage 1 | stage 2, distilled | stage 2, `objective: lm` | fsdp over 8 | fsdp over 64 | gathered |")
    print("|---|---|---|---|---|---|---|")
    for model in MODELS:
        n = model.parameters
        held, cast = transfer_bytes(n, n), cast_bytes(n)
        plain = transfer_bytes(n, n, distill=False) + cast
        cells = [select_bytes(n), held + cast, plain, sharded(held, 8), sharded(held, 64), layer_bytes(model)]
        print(f"| {model.name} | {' | '.join(f'{size / 1e9:,.0f} GB' for size in cells)} |")
    print("\n| model, GPUs | FLOPs, stages 1 + 2 | sent per step | stage 1 | stage 2 |")
    print("|---|---|---|---|---|")
    for model, processes, how in (
        (MODELS[0], 1, "none"),
        (MODELS[0], 8, "ddp"),
        (MODELS[1], 8, "fsdp"),
        (MODELS[2], 8, "fsdp"),
        (MODELS[3], 64, "fsdp"),
    ):
        divided = how == "fsdp"
        sent = gathered_bytes(model.parameters, processes) if divided else reduced_bytes(model, processes)
        first, second = hours(model, processes, sent, divided)
        work = sum(flops(model, processes, divided))
        print(
            f"| {model.name}, {processes} ({how}) | {work:.1e} | {sent / 1e9:,.0f} GB | {first * 60:,.1f} min | "
            f"{second * 60:,.1f} min |"
        )


if __name__ == "__main__":
    main()
