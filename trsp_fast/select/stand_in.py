"""What stands for a layer while its loss is judged: a change of the projection below it, fitted to what the layer did.

Stage 2 begins with a fold (trsp_fast.fold), so that what a direct cut loses is not what is lost in the end: a layer may
be missed a lot and be almost linear in what the layer below it has computed. With `select.judge` = fold a candidate is
bypassed and folded into that one layer, which needs one pass of a few windows for all candidates. The change of a layer
that was chosen stays until its rounds end: the next ones are judged, and gates learn, on a model that has it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trsp_fast.engine.distributed import Group
from trsp_fast.engine.objective import INFERENCE_BATCH
from trsp_fast.engine.teacher import InputTap
from trsp_fast.fold import PART_TOKENS, Change, Projection, input_size, place_of_sums, projections, share_of
from trsp_fast.models.bypass import is_bypassed
from trsp_fast.models.families import layer_stack
from trsp_fast.models.free_memory import free_memory
from trsp_fast.models.prefix import Prefix
from trsp_fast.ridge import VALIDATION, Sums, best_change, with_ones

WINDOWS = 32  # at most that the changes are fitted to, and not more than half
SUMS_SHARE = 0.25  # of the free memory that the sums of several layers may take


@dataclass(frozen=True)
class StandIn:
    """below: the layer whose projection changes; a pass that has it must begin there or lower."""

    below: int
    change: Change

    @contextmanager
    def in_place(self) -> Iterator[None]:
        old = self.change.saved()
        try:
            self.change.apply()
            yield
        finally:
            self.change.undo(old)


class _Place(NamedTuple):
    """A projection that may change, its bias if that may too, and the factor with which its layer hands it on."""

    module: Projection
    bias: Tensor | None
    share: float

    @property
    def inputs(self) -> int:
        return input_size(self.module) + (self.bias is not None)


class StandIns:
    """Makes them, and counts what that takes.

    others: the windows that no change is fitted to, to judge candidates by: on its own ones a fold looks better than it
        is, and most so where it has most to fit. cost: in forward passes of one window, all processes together.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, group: Group) -> None:
        """Find the projections that may change.

        Args:
            model: with no layer bypassed.
            tokens: calibration windows, int64 `[samples, seq]`, of which some are taken, evenly spread.
        """
        self.model, self.group, self.cost = model, group, float(group.size)
        count = fitted_windows(len(tokens))
        taken = torch.zeros(len(tokens), dtype=torch.bool)
        taken[torch.arange(count) * len(tokens) // max(1, count)] = True
        self.tokens, self.others = tokens[taken], tokens[~taken]
        self.device, self.stack = next(model.parameters()).device, layer_stack(model)
        window, prefix = tokens[:1].to(self.device), Prefix(model)
        found = projections(model, window)
        owners = Counter(id(parameter) for module in found.values() for parameter in module.parameters())
        self._places: dict[int, _Place] = {}
        for layer, module in found.items():
            if owners[id(module.weight)] < 2:
                self.cost += group.size * 2 * (layer + 1) / len(self.stack)
                if share := share_of(prefix, layer, module, window, nullcontext(), group):
                    own = module.bias is not None and owners[id(module.bias)] < 2
                    self._places[layer] = _Place(module, module.bias if own else None, share)

    def obstacle(self) -> str | None:
        """Why no layer can have one."""
        if len(self.tokens) < VALIDATION:
            wanted, found = 2 * VALIDATION, len(self.tokens) + len(self.others)
            return f"that takes {wanted} windows, one half to fit and one to judge, and there are {found}"
        return None if self._places else "no layer ends with a projection of its own that is added to the states"

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # compiled layers would not call the hooks inside
    def of(self, layers: Sequence[int]) -> dict[int, StandIn]:
        """By layer, as the model is now; without those that have none.

        That is a layer with none below it, or above one whose output is not a sum with a projection's in it or whose
        projection other layers use too, and one that nothing linear would bring nearer.
        """
        waiting = {layer: below for layer in layers if (below := self._below(layer)) in self._places}
        stand_ins = {}
        while waiting:
            now = dict(list(waiting.items())[: self._at_once(list(waiting.values()))])
            for layer, (fitting, judging) in self._sums(now).items():
                solution = best_change(fitting, judging, self.device, self.group)
                if solution is not None:
                    place = self._places[now[layer]]
                    stand_ins[layer] = StandIn(now[layer], Change.of(place.module, place.bias, solution))
            waiting = {layer: below for layer, below in waiting.items() if layer not in now}
        return stand_ins

    def _below(self, layer: int) -> int | None:
        """The next layer below that runs."""
        return next((index for index in range(layer - 1, -1, -1) if not is_bypassed(self.stack.layers[index])), None)

    def _above(self, layer: int) -> int:
        """Where the states behind `layer` are read: the next layer that runs, or the end."""
        above = (index for index in range(layer + 1, len(self.stack)) if not is_bypassed(self.stack.layers[index]))
        return next(above, len(self.stack))

    def _at_once(self, below: list[int]) -> int:
        """Of how many projections the sums have room together, at least one; the same in all processes."""
        room, taken = SUMS_SHARE * free_memory(self.device), 0.0
        for number, layer in enumerate(below):
            inputs, hidden = self._places[layer].inputs, self._hidden
            taken += 3 * 8 * inputs * (inputs + hidden)  # fp64: of both kinds of windows, and to solve
            if self.group.highest(int(number > 0 and taken > room))[0]:
                return number
        return len(below)

    @property
    def _hidden(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    def _sums(self, places: dict[int, int]) -> dict[int, tuple[Sums, Sums]]:
        """By layer, of the windows that fit its change and of those that judge the ridge; `places`: layers below."""
        modules = {layer: self._places[below] for layer, below in places.items()}
        after = {layer: self._above(layer) for layer in places}
        sums: dict[int, tuple[Sums, Sums]] = {}
        for layer, own in modules.items():
            place = place_of_sums(own.inputs, self.device, self.group)
            sums[layer] = Sums(own.inputs, self._hidden, place), Sums(own.inputs, self._hidden, place)
        taken: dict[int, Tensor] = {}
        batch = max(1, min(INFERENCE_BATCH, PART_TOKENS // self.tokens.shape[1]))
        with ExitStack() as hooks:
            tap = hooks.enter_context(InputTap(self.model, {*places, *after.values()}))
            for layer, (module, *_) in modules.items():
                hooks.callback(module.register_forward_hook(_taker(taken, layer)).remove)
            for rows, _ in self.group.parts(torch.arange(len(self.tokens)), batch):
                self.model(input_ids=self.tokens[rows].to(self.device), use_cache=False)
                judges = rows % VALIDATION == VALIDATION - 1
                for layer, (_, bias, share) in modules.items():
                    entering = tap.taken[layer].float()
                    lacking = tap.taken[after[layer]].float() - entering
                    h = taken[layer].view(*entering.shape[:2], -1)
                    h = h if bias is None else with_ones(h)
                    for some, chosen in zip(sums[layer], (~judges, judges), strict=True):
                        some.add(h[chosen].flatten(0, 1), lacking[chosen].flatten(0, 1), share)
        self.cost += len(self.tokens)
        self.group.sum([tensor for pair in sums.values() for some in pair for tensor in (some.a, some.b, some.c)])
        return sums


def fitted_windows(samples: int) -> int:
    """Of `samples`."""
    return min(WINDOWS, samples // 2)


def _taker(taken: dict[int, Tensor], layer: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        taken[layer] = args[0]

    return hook
