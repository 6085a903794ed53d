"""What a run hands to its stages: who listens, what is kept, in which pieces a batch is computed, by how many."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.engine.distributed import Group
from trsp_fast.engine.head import obstacle
from trsp_fast.engine.losses import (
    FULL_DISTILLATION,
    Distillation,
    LossChoice,
    choose_distillation,
    choose_loss,
    paired_seconds,
)
from trsp_fast.engine.memory import MemoryPlan, free_memory, is_out_of_memory
from trsp_fast.engine.teacher import Teacher, store_states, stored_bytes
from trsp_fast.errors import UserError
from trsp_fast.run.events import Events
from trsp_fast.run.state import Keeper

SCARCE = "there is not enough memory for one window; set data.seq_len lower, or use a device with more{}."
LOGITS_SHARE = 4  # all logits of one window may take one part in so many of the free memory
# and the untouched model's states one part in so many: activations need what a GPU has left
HOST_STATES_SHARE, DEVICE_STATES_SHARE = 4, 8


def place_of_states(needed: int, device: torch.device, coming: int) -> tuple[str | None, str]:
    """Where states of so many bytes are kept, the device's type or cpu, and why; None: nowhere."""
    reason = ""
    for place in dict.fromkeys((device, torch.device("cpu"))):
        free = free_memory(place) - (coming if place == device else 0)
        reason = f"its states take {needed / 1e6:,.0f} MB, {max(0, free) / 1e6:,.0f} MB will be free on {place.type}"
        if needed <= free // (HOST_STATES_SHARE if place.type == "cpu" else DEVICE_STATES_SHARE):
            return place.type, reason
    return None, reason


@dataclass
class Session:
    """Everything of a run that is not its model, its tokens and its configuration.

    micro_batch: windows in one forward pass; 0 leaves it to a plan. Losses and gradients do not depend on it but by
        rounding, since a micro-batch holds whole windows and weighs as much as it has.
    """

    events: Events = field(default_factory=Events)
    keeper: Keeper = field(default_factory=Keeper)
    group: Group = field(default_factory=Group)
    micro_batch: int = 0

    def __post_init__(self) -> None:
        self._given = self.micro_batch

    def decide(self, what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Plain values that are found out once: an interrupted run goes on with what it had found."""
        decided = self.keeper.facts.setdefault("decided", {})
        if what not in decided:
            decided[what] = self.group.first(make)
        return decided[what]

    def plan(self, stage: str, tokens: int, make: Callable[[], MemoryPlan]) -> MemoryPlan:
        """The memory plan of a stage with steps of so many tokens; a `micro_batch` that was given needs none."""
        values = self.decide(f"plan of {stage}", lambda: (MemoryPlan(self._given) if self._given else make()).to_dict())
        plan = MemoryPlan.from_dict(values)
        self.micro_batch = plan.micro_batch
        self.events.emit("plan", stage=stage, tokens=tokens, **values)
        return plan

    def loss(self, model: PreTrainedModel, window: Tensor, *, reproducible: bool) -> LossChoice:
        """The language model loss of a stage, chosen on one window; see trsp_fast.engine.losses.

        Without a GPU, or where bits must repeat, no stopwatch decides: then memory alone does.
        """
        probe = None if reproducible or not window.is_cuda else paired_seconds

        def make() -> dict[str, Any]:
            choice = choose_loss(model, window, budget=self._logits_budget(window), events=self.events, probe=probe)
            return {"name": choice.name, "reason": choice.reason}

        return LossChoice(model, **self.decide("loss", make))

    def distillation(self, model: PreTrainedModel, teacher: Teacher, window: Tensor) -> Distillation:
        """The distance to the untouched model's logits, chosen on one window before anything is trained."""
        budget = self._logits_budget(window)

        def make() -> dict[str, Any]:
            choice = choose_distillation(model, model, window, budget=budget, events=self.events)
            if teacher.head is None:  # it has logits only
                choice = replace(choice, name=FULL_DISTILLATION)
            return {"name": choice.name, "reason": choice.reason, "budget": budget}

        return Distillation(model, teacher.head, **self.decide("distillation", make))

    def teacher(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        points: Sequence[int],
        batch: int,
        copied: Callable[[], Teacher],
        *,
        coming: int,
    ) -> Teacher:
        """The untouched model, which `model` still is: its states of all windows where they fit, else what `copied` is.

        Args:
            points: layers whose inputs are imitated; see `teacher.Targets`.
            batch: windows in one forward pass.
            coming: bytes that the stage will take on the model's device.
        """
        device = next(model.parameters()).device

        def make() -> dict[str, Any]:
            if reason := obstacle(model):
                return {"stored": False, "reason": reason}
            place, reason = place_of_states(stored_bytes(model, tokens, points), device, coming)
            return {"stored": place is not None, "place": place, "reason": reason}

        decided = self.decide("teacher", make)
        self.events.emit("teacher", **decided)
        if not decided["stored"]:
            return copied()
        return store_states(model, tokens, points, batch, on_device=decided.get("place", "cpu") == device.type)

    @staticmethod
    def _logits_budget(window: Tensor) -> int:
        return free_memory(window.device) // LOGITS_SHARE

    def accumulate(self, rows: Tensor, work: Callable[[Tensor, float], None], begin: Callable[[], None]) -> None:
        """Call `work(rows, weight)` for each micro-batch of a batch's rows, after `begin()`.

        Where memory runs out, in any process, the micro-batch is halved in all, once and for all, and the batch begins
        anew.

        Raises:
            UserError: there is no memory for a single window.
        """
        while True:
            begin()
            parts, failed = self.group.parts(rows, self.micro_batch), 0
            try:
                for part, weight in parts:
                    work(part, weight)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.group.sharded:  # the others are inside of FSDP's exchanges and would wait there
                    raise UserError(SCARCE.format(", or more of them")) from None
                failed = len(parts[0][0])
            # outside of the handler, which holds on to the tensors of the failed pass
            (size,) = self.group.highest(failed)
            if not size:
                return
            self._halve(size)

    def _halve(self, size: int) -> None:
        if size == 1:
            raise UserError(SCARCE.format(""))
        self.micro_batch = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.events.note(
            f"memory ran out with {size} windows in one pass; {self.micro_batch} at a time from here on, which changes "
            "results by rounding only."
        )
