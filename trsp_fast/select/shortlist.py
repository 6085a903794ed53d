"""How stage 1 judges a shortlist: by a race, of layers bypassed alone or folded besides, on the model as it stands."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from trsp_fast.config import TRSPConfig
from trsp_fast.select.gate_learning import Learning
from trsp_fast.select.race import Race, race
from trsp_fast.select.stand_in import StandIn, StandIns


def make_stand_ins(learning: Learning, config: TRSPConfig) -> StandIns | None:
    """None where candidates are judged by their cut: where that is asked for, or where no weight may change."""
    settings, session = config.select, learning.session
    if settings.judge == "cut" or settings.shortlist < 2:
        return None
    obstacles = {
        "all weights are trained": settings.train_weights,
        "the layers' weights are in host memory": config.run.offload != "none",
        "their weights are divided": session.group.sharded,
    }
    reason, stand_ins = next((reason for reason, applies in obstacles.items() if applies), None), None
    if reason is None:
        stand_ins = StandIns(learning.model, learning.tokens, session.group)
        reason = stand_ins.obstacle()
    if reason:
        session.events.note(f"the layers to choose from are judged by their cut, not by their fold: {reason}.")
        return None
    return stand_ins


def bypass_with_stand_ins(learning: Learning, layers: Sequence[int], during: ExitStack) -> None:
    """Bypass `layers` in this order; what stands for each, fitted while the next are on, stays until `during` ends."""
    gates = learning.gates
    for layer in layers:
        if learning.stand_ins is not None:
            with gates.neutral():
                if stand_in := learning.stand_ins.of([layer]).get(layer):
                    during.enter_context(stand_in.in_place())
        gates.bypass([layer])


def raced(learning: Learning, layers: list[int], wanted: int) -> tuple[Race, dict[int, StandIn]]:
    """The race of `layers`, and what stood for each of these where they are folded."""
    tokens, stand_ins = learning.tokens, dict[int, StandIn]()
    with learning.gates.neutral():
        if learning.stand_ins is not None:
            with fits_counted(learning):
                stand_ins = learning.stand_ins.of(layers)
            tokens = learning.stand_ins.others
        found = race(learning.model, tokens, layers, wanted, learning.session.group, stand_ins)
    learning.cost += math.ceil(found.cost)
    return found, stand_ins


@contextmanager
def fits_counted(learning: Learning) -> Iterator[None]:
    """What fitting takes inside is part of the choice's cost; what a resumed run fits again is not."""
    before = learning.stand_ins.cost if learning.stand_ins else 0.0
    yield
    learning.cost += math.ceil(learning.stand_ins.cost - before) if learning.stand_ins else 0


def told(found: Race, stand_ins: dict[int, StandIn]) -> dict[str, Any]:
    """For the record: loss and number of windows by layer, those folded, and those within reach to the end."""
    judged = {layer: {"loss": float(one.mean()), "windows": len(one)} for layer, one in found.losses.items()}
    return {"judged": judged, "folded": sorted(stand_ins), "close": sorted(found.close)}
