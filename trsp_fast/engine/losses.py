"""Which of two equal losses a stage computes: the model's own, or one that never holds all logits.

The second is taken only where the model is known to have a plain head, gives the model's own loss and gradient on the
first batch, and is faster or the only one that fits.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp_fast.engine.head import (
    chunked_cross_entropy,
    chunked_distillation,
    compute_dtype,
    has_chunked_cross_entropy,
    hidden_states,
    logits_bytes,
    obstacle,
    output_head,
    plain_cross_entropy,
)
from trsp_fast.engine.objective import distillation_loss, language_model_loss
from trsp_fast.engine.teacher import Targets
from trsp_fast.run.events import Events

OWN = "the model's own"
CHUNKED = "chunked linear cross-entropy"
FULL_DISTILLATION = "distillation on all logits"
CHUNKED_DISTILLATION = "chunked distillation"

PROBE_SECONDS = 10

# Two closures, each one forward and backward pass of the head -> seconds of each.
Probe = Callable[[Callable[[], object], Callable[[], object]], tuple[float, float]]
# (head, hidden states, tokens) -> mean next-token loss
HeadLoss = Callable[[nn.Linear, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossChoice:
    """Mean next-token loss of windows of tokens, int64 `[samples, seq]` -> 0-D.

    A resumed run makes it from the recorded name rather than by `choose_loss`: a probe may find otherwise then, and
    the two losses are equal to rounding only.
    """

    model: PreTrainedModel
    name: str = OWN
    reason: str = "as asked"

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.name == OWN:
            return language_model_loss(self.model, tokens)
        return chunked_cross_entropy(output_head(self.model), hidden_states(self.model, tokens), tokens)


@dataclass(frozen=True)
class Distillation:
    """KL(teacher || student) per token and the student's mean next-token loss (no gradient), both 0-D, of windows.

    teacher_head: the untouched model's, where it is plain; `Targets` have logits where it is not.
    """

    model: PreTrainedModel
    teacher_head: nn.Linear | None
    name: str = FULL_DISTILLATION
    reason: str = "as asked"
    budget: int | None = None

    def __call__(self, tokens: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        head, before_head = self.teacher_head, targets.before_head
        if self.name == FULL_DISTILLATION:
            output = self.model(input_ids=tokens, labels=tokens, use_cache=False)
            with torch.no_grad():
                logits = targets.logits if head is None or before_head is None else head(before_head)
            assert logits is not None
            return distillation_loss(output.logits, logits), output.loss.detach()
        assert head is not None
        assert before_head is not None
        heads = output_head(self.model), head
        states = hidden_states(self.model, tokens)
        needed = logits_bytes(heads[0], tokens.numel(), heads[1])
        chunks = min(tokens.numel(), math.ceil(needed / self.budget)) if self.budget else 1
        return chunked_distillation(heads, (states, before_head), tokens, chunks)


def paired_seconds(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of two closures that run in turn, after one call of each that does not count.

    Three rounds, or fewer once PROBE_SECONDS are spent: a head may take as long as the rest of the model.
    """
    started = time.perf_counter()
    rounds: list[tuple[float, float]] = []
    while len(rounds) < 4 and (len(rounds) < 2 or time.perf_counter() - started < PROBE_SECONDS):
        rounds.append((_seconds(first), _seconds(second)))
    own, other = zip(*rounds[1:], strict=True)
    return statistics.median(own), statistics.median(other)


def _seconds(closure: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    closure()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def choose_loss(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    budget: int | None = None,
    events: Events | None = None,
    probe: Probe | None = paired_seconds,
) -> LossChoice:
    """The loss of a stage, chosen on its first batch; emits the event `loss` with name and reason.

    Call it as the loss will be called: inside the same autocast and LayerGates, weights in the dtype of training.

    Args:
        tokens: the first batch, int64 `[samples, seq]` on the model's device.
        budget: bytes that logits and what is made of them may take; None: as many as they like.
        probe: measures both; None: only the budget decides, so that equal runs choose alike.
    """
    name, reason = _choose(model, tokens, budget, probe)
    (events or Events()).emit("loss", name=name, reason=reason)
    return LossChoice(model, name, reason)


def _choose(model: PreTrainedModel, tokens: Tensor, budget: int | None, probe: Probe | None) -> tuple[str, str]:
    if not has_chunked_cross_entropy():
        return OWN, f"torch {torch.__version__} has no chunked linear cross-entropy"
    if reason := obstacle(model):
        return OWN, reason
    head = output_head(model)
    if compute_dtype(head) == torch.float16:
        return OWN, "chunked gradients underflow in fp16"
    needed = logits_bytes(head, tokens.numel())
    demanded = budget is not None and needed > budget
    if not demanded and probe is None:
        return OWN, f"{_megabytes(needed)} of logits fit"
    part = _part(tokens, needed, budget) if demanded and budget is not None else tokens
    if reason := disagreement(model, part, chunked_cross_entropy):
        return OWN, reason
    if demanded or probe is None:
        return CHUNKED, f"logits would take {_megabytes(needed)}, {_megabytes(budget or 0)} are there for them"
    own, chunked = probe(*_passes(model, tokens))
    name = CHUNKED if chunked < own else OWN
    return name, f"chunked takes {chunked:.3g} s a batch for the head, the model's own {own:.3g} s"


def choose_distillation(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Tensor,
    *,
    budget: int | None = None,
    events: Events | None = None,
) -> Distillation:
    """The distillation of a stage, chosen on its first batch; emits the event `loss` with name and reason.

    In chunks, which compute the logits twice, only where all of them exceed `budget` bytes and both heads are plain.

    Args:
        teacher: the untouched model; before training, `model` itself.
    """
    name, reason = _choose_distillation(model, teacher, tokens, budget)
    (events or Events()).emit("loss", name=name, reason=reason)
    return Distillation(model, None if obstacle(teacher) else output_head(teacher), name, reason, budget)


def _choose_distillation(
    model: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, budget: int | None
) -> tuple[str, str]:
    for whose in (model, teacher):
        if reason := obstacle(whose):
            return FULL_DISTILLATION, reason
    needed = logits_bytes(output_head(model), tokens.numel(), output_head(teacher))
    if budget is None or needed <= budget:
        return FULL_DISTILLATION, f"{_megabytes(needed)} of logits fit"
    part = _part(tokens, needed, budget)
    for whose in (model, teacher):
        if reason := disagreement(whose, part, plain_cross_entropy):
            return FULL_DISTILLATION, reason
    return CHUNKED_DISTILLATION, f"logits would take {_megabytes(needed)}, {_megabytes(budget)} are there for them"


def disagreement(model: PreTrainedModel, tokens: Tensor, candidate: HeadLoss) -> str | None:
    """How `candidate` differs from the model's own loss on these windows, in value or gradient; None: by rounding.

    A logit z is rounded by up to eps*|z|/2 in the compute dtype, which moves a token's loss by up to eps*max|z| and
    its probabilities, hence the gradient of the hidden states, by that share of themselves. So much is allowed in
    bf16, and 16 times as much in fp32 and fp64, where the sums of the product weigh more than the rounding of its
    result. A cap or scale shows in any dtype; what adds less than that to the loss (an auxiliary loss in bf16) does
    not, which is why the family's record is asked first.
    """
    training = model.training
    model.eval()  # the same function twice: no dropout
    try:
        own, own_gradient, largest = _own_loss_and_gradient(model, tokens)
        loss, states = _detached(model, tokens, candidate)
        (gradient,) = torch.autograd.grad(loss, states)
    finally:
        model.train(training)
    dtype = compute_dtype(output_head(model))
    bound = (1 if dtype.itemsize < 4 else 16) * torch.finfo(dtype).eps * (1 + largest)
    by_value = float((loss.detach() - own).abs())
    by_gradient = float((gradient - own_gradient).float().norm() / own_gradient.float().norm())
    if by_value <= bound and by_gradient <= bound:
        return None
    return (
        f"on the first batch the loss of the head alone differs by {by_value:.1g} of {float(own):.4g} and its gradient "
        f"by {by_gradient:.1g} of itself, rounding explains {bound:.1g}"
    )


def _own_loss_and_gradient(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor, float]:
    """The model's own loss, its gradient in the hidden states before the head, and the largest |logit|."""
    seen: list[Tensor] = []

    def leaf(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0].detach().requires_grad_())
        torch.set_grad_enabled(True)  # from here on; the layers before need none
        return (seen[-1],)

    handle = output_head(model).register_forward_pre_hook(leaf)
    try:
        with torch.no_grad():
            output = model(input_ids=tokens, labels=tokens, use_cache=False)
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(output.loss, seen[-1])
    return output.loss.detach(), gradient, float(output.logits.detach().abs().max())


def _detached(model: PreTrainedModel, tokens: Tensor, loss: HeadLoss) -> tuple[Tensor, Tensor]:
    """The loss of the head alone, and the hidden states in which it has a gradient."""
    with torch.no_grad():
        states = hidden_states(model, tokens)
    states.requires_grad_()
    with torch.enable_grad():
        return loss(output_head(model), states, tokens), states


def _passes(model: PreTrainedModel, tokens: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """One forward and backward pass of the head on the first batch, by the model's own loss function and chunked."""
    head = output_head(model)
    with torch.no_grad():
        states = hidden_states(model, tokens)
    states.requires_grad_()
    inputs = [states, *(weight for weight in head.parameters() if weight.requires_grad)]

    def own() -> object:
        loss = model.loss_function(logits=head(states), labels=tokens, vocab_size=head.out_features)
        return torch.autograd.grad(loss, inputs)

    return own, lambda: torch.autograd.grad(chunked_cross_entropy(head, states, tokens), inputs)


def _part(tokens: Tensor, needed: int, budget: int) -> Tensor:
    """As many windows, or as much of one, as can be compared within the budget."""
    share = budget / needed * len(tokens)
    if share >= 1:
        return tokens[: int(share)]
    return tokens[:1, : max(2, int(share * tokens.shape[1]))]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
