"""The losses of both stages, and how batches are drawn."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

# Windows in one forward pass without gradients: enough to keep the processor busy, little memory.
INFERENCE_BATCH = 16


def language_model_loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The model's own mean next-token loss on windows of tokens, int64 `[samples, seq]`; 0-D."""
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def losses_by_window(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """`language_model_loss` of each window, float64 `[samples]`; what the model adds to it (router losses) is shared.

    One window at a time: a copy of all logits in fp32 may not fit.
    """
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    windows = zip(output.logits, tokens, strict=True)
    own = torch.stack([F.cross_entropy(logits[:-1].float(), window[1:]).double() for logits, window in windows])
    return own + (output.loss.double() - own.mean())


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student), in fp32; `[samples, seq, vocabulary]` both."""
    student = F.log_softmax(logits.float(), -1).flatten(0, -2)
    teacher = F.log_softmax(teacher_logits.float(), -1).flatten(0, -2)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    tokens: Tensor,
    batch: int = INFERENCE_BATCH,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Mean next-token loss over all windows, in evaluation mode; windows of one length weigh the same.

    Args:
        loss: of one batch, where not the model's own: a `losses.LossChoice` for vocabularies whose logits do not fit.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for part in tokens.split(batch):
        part = part.to(device)
        mean = language_model_loss(model, part) if loss is None else loss(part)
        total += mean.double().cpu() * len(part)
    model.train(training)
    return float(total / len(tokens))


class WindowOrder:
    """Which windows a step sees: each pass visits every window once, in a fresh order; its last batch may be smaller.

    A pure function of seed and step, so that a resumed run sees what the interrupted one would have seen.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch = count, batch
        self.steps_per_pass = math.ceil(count / batch)
        self._generator = torch.Generator().manual_seed(seed)
        self._passes: list[Tensor] = []

    def rows(self, step: int) -> Tensor:
        """Indices of the windows of one step, int64 `[windows]`."""
        number, place = divmod(step, self.steps_per_pass)
        while len(self._passes) <= number:
            self._passes.append(torch.randperm(self.count, generator=self._generator))
        return self._passes[number][place * self.batch : (place + 1) * self.batch]
