"""A second look at what was chosen early: each layer went while those that went later were still there.

Choosing one after the other cannot take anything back. So each chosen layer but the last comes back once, alone, and is
raced against those that were within reach in some round and were not chosen. Steps like these are known from
experimental design (Fedorov, 1972) and from the choice of features (Pudil et al., Pattern Recognition Letters 1994).
"""

from contextlib import ExitStack

from trsp_fast.select.gate_learning import Learning, state_bytes, state_of
from trsp_fast.select.shortlist import bypass_with_stand_ins, fits_counted, raced, told


def exchange(learning: Learning) -> None:
    """Look at all of them, or at those that an interrupted run had still to look at; `learning.chosen` changes."""
    while (position := learning.index - learning.count) < learning.count - 1:
        _look_again(learning, position)
        learning.index += 1
        learning.session.keeper.after_step(lambda: state_of(learning), last=True, size=state_bytes(learning))


def _look_again(learning: Learning, position: int) -> None:
    gates, chosen, old = learning.gates, learning.chosen, learning.chosen[position]
    rivals = _close(learning)
    if not rivals:
        return
    others = [layer for layer in chosen if layer != old]
    gates.restore(chosen)
    with ExitStack() as standing:
        with fits_counted(learning):
            bypass_with_stand_ins(learning, others, standing)
        found, stand_ins = raced(learning, [old, *rivals], 1)
    best = learning.session.group.agree(found.ranked[0])
    gates.bypass([best])
    learning.chosen = [*chosen[:position], best, *chosen[position + 1 :]]
    entry = {"round": learning.index, "layer": best, "instead_of": old, **told(found, stand_ins)}
    learning.rounds.append(entry)
    learning.session.events.emit("exchange", **entry)


def _close(learning: Learning) -> list[int]:
    """Those that were within reach in some round or look, and are not chosen."""
    close = {layer for entry in learning.rounds for layer in entry["close"]}
    return sorted(close - set(learning.chosen))
