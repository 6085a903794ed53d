"""A causal model's output head by itself: the hidden states before it, and losses that never hold all of its logits.

The logits of a large vocabulary are the largest tensor of a training step: 4,096 tokens of a 128k vocabulary in bf16
take 1 GB, their cross-entropy in fp32 with its gradient 6 GB more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from trsp_fast.models.families import head_obstacle

IGNORED = -100  # the label of a window's last token, which has no next one


def obstacle(model: PreTrainedModel) -> str | None:
    """Why the head cannot be taken by itself, None if it can (see `families.head_obstacle`)."""
    if reason := head_obstacle(model.config.to_dict()):
        return reason
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return "its head is not a bare linear layer"
    if type(head.weight.data) is not Tensor or head.weight.is_meta:
        return "the weights of its head are not all here"
    return None


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The linear layer that makes the logits, where `obstacle` has none."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


def hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the head is given for windows of tokens, int64 `[samples, seq]`: `[samples, seq, hidden]`.

    The whole model is called, its head being the identity for once: hooks on it and on any module inside (LayerGates,
    the root of FSDP) run as always, and what stands between stack and head (OPT's projection) is not forgotten.
    """
    with _identity(output_head(model)):
        return model(input_ids=tokens, use_cache=False).logits


@contextmanager
def _identity(head: nn.Linear) -> Iterator[None]:
    head.__dict__["forward"] = lambda states: states
    try:
        yield
    finally:
        del head.__dict__["forward"]


def next_tokens(tokens: Tensor) -> Tensor:
    """The label of every position, int64 `[samples * seq]`; the last one of each window has none."""
    return F.pad(tokens[:, 1:], (0, 1), value=IGNORED).flatten()


def compute_dtype(head: nn.Linear) -> torch.dtype:
    """In which the head multiplies: autocast's dtype inside autocast, else that of its weights."""
    kind = head.weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype


def has_chunked_cross_entropy() -> bool:
    """Whether this torch (2.13 and newer) has the chunked linear cross-entropy."""
    return hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")


def chunked_cross_entropy(head: nn.Linear, states: Tensor, tokens: Tensor) -> Tensor:
    """Mean next-token loss of hidden states by torch's chunked linear cross-entropy; 0-D, backward works once.

    In bf16 torch rounds what it returns to bf16: a mean would keep two digits. Each token's loss is asked for instead
    and averaged in fp32, which costs one more product with the weights in backward. Gradients are then off by the
    rounding of 1/tokens to bf16, a factor within 0.2% of 1.

    Args:
        states: `[samples, seq, hidden]` as `hidden_states` gives them.
        tokens: the windows, int64 `[samples, seq]`.
    """
    dtype, labels = compute_dtype(head), next_tokens(tokens)
    exact = dtype.itemsize >= 4
    with torch.autocast(states.device.type, enabled=False):  # the dtypes of the sums inside are torch's own choice
        losses = F.linear_cross_entropy(
            states.flatten(0, 1).to(dtype),
            head.weight.to(dtype),
            labels,
            linear_bias=None if head.bias is None else head.bias.to(dtype),
            reduction="mean" if exact else "none",
            ignore_index=IGNORED,
            options=nn.LinearCrossEntropyOptions(),
        )
        return losses if exact else losses.float().sum() / (labels != IGNORED).sum()


def plain_cross_entropy(head: nn.Linear, states: Tensor, tokens: Tensor) -> Tensor:
    """Mean next-token loss of hidden states with all logits at once, as `ForCausalLM` models compute it; 0-D."""
    return F.cross_entropy(head(states).flatten(0, 1).float(), next_tokens(tokens), ignore_index=IGNORED)


def chunked_distillation(
    heads: tuple[nn.Linear, nn.Linear], states: tuple[Tensor, Tensor], tokens: Tensor, chunks: int
) -> tuple[Tensor, Tensor]:
    """Mean KL(teacher || student) per token, and the student's mean next-token loss without gradient; 0-D both.

    Of one chunk at a time are there logits and log-probabilities; backward computes them once more.

    Args:
        heads: of student and teacher.
        states: hidden states before them, `[samples, seq, hidden]`, the teacher's without gradient.
        tokens: the windows, int64 `[samples, seq]`.
        chunks: how many parts the tokens are split into.
    """
    student, teacher, labels = states[0].flatten(0, 1), states[1].flatten(0, 1), next_tokens(tokens)
    divergence = torch.zeros((), device=labels.device)
    loss = torch.zeros((), device=labels.device)
    split = [whole.tensor_split(chunks) for whole in (student, teacher, labels)]
    for part in zip(*split, strict=True):
        sums: Any = checkpoint(_distillation_sums, heads, *part, use_reentrant=False, preserve_rng_state=False)
        divergence, loss = divergence + sums[0], loss + sums[1]
    return divergence / len(labels), loss / (labels != IGNORED).sum()


def _distillation_sums(
    heads: tuple[nn.Linear, nn.Linear], student: Tensor, teacher: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of the divergence and of the student's next-token loss."""
    own = F.log_softmax(heads[0](student).float(), -1)
    target = F.log_softmax(heads[1](teacher).float(), -1)
    divergence = F.kl_div(own, target, reduction="sum", log_target=True)
    return divergence, F.nll_loss(own.detach(), labels, ignore_index=IGNORED, reduction="sum")


def logits_bytes(head: nn.Linear, tokens: int, teacher: nn.Linear | None = None) -> int:
    """Peak memory of all logits and what is made of them in one training step on `tokens` tokens.

    Cross-entropy: the logits, log-probabilities and two gradients of these in fp32. Distillation: the logits of both,
    log-probabilities of the student (twice: its loss is logged) and three temporaries of the divergence, all fp32,
    and the teacher's log-probabilities. Vocabularies of both are alike.
    """
    size = compute_dtype(head).itemsize
    per_logit = size + 3 * 4 if teacher is None else size + compute_dtype(teacher).itemsize + 6 * 4
    return tokens * head.out_features * per_logit
