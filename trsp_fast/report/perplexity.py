"""Perplexity, by the standard protocol, with strides, and by that of the paper's authors."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.engine.distributed import Group
from trsp_fast.engine.memory import is_out_of_memory
from trsp_fast.engine.objective import INFERENCE_BATCH
from trsp_fast.errors import UserError

UNSCORED = -100  # the label of a token that is context only, as transformers' losses take it

# (windows done, windows in all)
Progress = Callable[[int, int], None]


def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    batch: int = INFERENCE_BATCH,
    group: Group | None = None,
    progress: Progress | None = None,
) -> float:
    """exp of the mean next-token loss over non-overlapping windows.

    Args:
        model: a transformers causal language model.
        tokens: int64 `[windows, seq]`; every window starts without context, its first token is not predicted.
        batch: windows per forward pass; halved where they do not fit into memory.
        group: processes that share the windows, each with this model.
        progress: told of the windows that are done.

    Raises:
        UserError: a single window does not fit into memory.
    """
    group, total = group or Group(), torch.zeros((), dtype=torch.float64)
    # divided weights: all processes must make as many passes
    parts = group.parts(torch.arange(len(tokens)), batch if group.sharded else 0)
    advance = _count(progress, sum(len(rows) for rows, _ in parts))
    for rows, weight in parts:
        total += _summed_losses(model, tokens[rows], batch, advance) / len(rows) * weight
    group.sum([total])
    return _exp(float(total))


def strided_perplexity(
    model: PreTrainedModel,
    stream: Tensor,
    length: int,
    stride: int,
    *,
    batch: int = INFERENCE_BATCH,
    progress: Progress | None = None,
) -> float:
    """exp of the mean next-token loss of a stream, each token predicted once and with more context.

    A window of `length` tokens begins every `stride` tokens. Of the first one all tokens are scored, of the others the
    last `stride`; a last, shorter one scores what is left. This is the sliding window of transformers' documentation,
    except that a window weighs by the tokens that it predicts (there, by one less, also where none is lost).

    Args:
        stream: int64 `[tokens]`.
        length: tokens of a window.
        stride: 1 to `length`; at `length` the windows are those of `perplexity`, with context for each first token
            still missing and the stream's rest scored too.
        batch, progress: as for `perplexity`.

    Raises:
        UserError: no such stride, a stream shorter than one window, or too little memory.
    """
    if not 1 <= stride <= length:
        raise UserError(f"the stride is {stride}; give 1 to {length}, the tokens of a window.")
    if stream.dim() != 1 or len(stream) < length:
        shape = f"separate windows of {stream.shape[1]} tokens" if stream.dim() == 2 else f"{len(stream)} tokens"
        raise UserError(f"the data has {shape}; a stride needs one text of at least {length} tokens, or leave it out.")
    windows = stream.unfold(0, length, stride)
    rest = stream[len(windows) * stride :]  # of which the last window has scored all but what it does not reach
    groups = [(windows[:1], 0), (windows[1:], length - stride), (rest[None], length - stride)]
    groups = [(part, context) for part, context in groups if part.shape[0] and part.shape[1] > max(1, context)]
    advance = _count(progress, sum(len(part) for part, _ in groups))
    total, scored = 0.0, 0
    for part, context in groups:
        predicted = part.shape[1] - max(1, context)
        total += _summed_losses(model, part, batch, advance, context) * predicted
        scored += predicted * len(part)
    return _exp(total / scored)


def authors_perplexity(model: PreTrainedModel, tokens: Tensor, *, progress: Progress | None = None) -> float:
    """Perplexity as the authors' code base computes it, which SLEB's and many others' share.

    What it does otherwise than `perplexity`: windows have 2048 tokens whatever the model's context is (the caller cuts
    them); one is computed at a time; the mean loss of a window's seq - 1 predictions is multiplied by seq, added up in
    fp32 and divided by windows * seq. All windows have the same length, so that factor cancels, and on the same windows
    the two agree up to rounding. It is meant for WikiText-2's test split, its lines joined by blank lines and tokenised
    as one text, the rest that fills no window dropped.

    Args:
        tokens: int64 `[windows, seq]`.
        progress: told of the windows that are done.

    Raises:
        UserError: a window does not fit into memory.
    """
    advance, seq = _count(progress, len(tokens)), tokens.shape[1]
    losses = [_summed_losses(model, window[None], 1, advance) * seq for window in tokens]
    return _exp(float(torch.tensor(losses, dtype=torch.float32).sum() / (len(tokens) * seq)))


@torch.no_grad()
def _summed_losses(
    model: PreTrainedModel, windows: Tensor, batch: int, advance: Callable[[int], None], context: int = 0
) -> float:
    """The sum over windows of the model's own mean loss, where the first `context` tokens of each are not scored."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    total, at = torch.zeros((), dtype=torch.float64), 0
    while at < len(windows):
        part = windows[at : at + batch].to(device)
        labels = part.clone()
        labels[:, :context] = UNSCORED
        mean = _loss_if_it_fits(model, part, labels)
        if mean is not None:
            total += mean.double().cpu() * len(part)
            at += len(part)
            advance(len(part))
        elif batch > 1:
            batch = -(-min(batch, len(part)) // 2)
        else:
            raise UserError(
                f"a window of {windows.shape[1]} tokens does not fit into memory; give a smaller --seq-len, "
                "or use a device with more."
            )
    model.train(training)
    return float(total)


def _loss_if_it_fits(model: PreTrainedModel, windows: Tensor, labels: Tensor) -> Tensor | None:
    try:
        return model(input_ids=windows, labels=labels, use_cache=False).loss
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    if windows.device.type == "cuda":
        torch.cuda.empty_cache()  # what is free in pieces is of no use to the smaller batch
    return None


def _count(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Adds up what is done for `progress`."""
    done = 0

    def advance(windows: int) -> None:
        nonlocal done
        done += windows
        if progress is not None:
            progress(done, total)

    return advance


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
