"""A second look at what was chosen early: each layer went while those that went later were still there.

Choosing one after the other cannot take anything back. So each chosen layer but the last comes back once, alone, where
its race was not clear or an earlier choice has changed since, and is raced against those that were within reach in some
round and were not chosen. Steps like these are known from experimental design (Fedorov, 1972) and from the choice of
features (Pudil et al., Pattern Recognition Letters 1994).
"""

import itertools
from contextlib import ExitStack
from typing import Any

from trsp_fast.select.gate_learning import Learning, state_bytes, state_of
from trsp_fast.select.shortlist import bypass_with_stand_ins, fits_counted, raced, told


def exchange(learning: Learning) -> None:
    """Look at all of them, or at those that an interrupted run had still to look at; `learning.chosen` changes."""
    rounds = [entry for entry in learning.rounds if not _is_look(entry)]
    looks = list(itertools.takewhile(_is_look, reversed(learning.rounds)))
    gone = looks[0]["position"] if looks else 0  # of a resumed run: those below were folded for its last look
    changed = any(look["layer"] != look["instead_of"] for look in looks)
    positions = range(gone + 1 if looks else 0, learning.count - 1)
    if not _close(learning) or not any(changed or _is_open(rounds[position]) for position in positions):
        return
    learning.gates.restore(learning.chosen)
    with ExitStack() as standing:
        bypass_with_stand_ins(learning, learning.chosen[:gone], standing)
        for position in positions:
            if not changed and not _is_open(rounds[position]):
                continue
            with fits_counted(learning):
                bypass_with_stand_ins(learning, learning.chosen[gone:position], standing)
            gone, old = position, learning.chosen[position]
            best = _best_at(learning, position)
            changed = changed or best != old
            learning.chosen = [*learning.chosen[:position], best, *learning.chosen[position + 1 :]]
            learning.index += 1
            learning.session.keeper.after_step(lambda: state_of(learning), last=True, size=state_bytes(learning))


def _best_at(learning: Learning, position: int) -> int:
    """Of the layer chosen there and its rivals the one that hurts least; those chosen before it are gone already."""
    old, later = learning.chosen[position], learning.chosen[position + 1 :]
    with ExitStack() as standing:
        with fits_counted(learning):
            bypass_with_stand_ins(learning, later, standing)
        found, stand_ins = raced(learning, [old, *_close(learning)], 1)
    learning.gates.restore(later)
    best = learning.session.group.agree(found.ranked[0])
    entry = {"position": position, "layer": best, "instead_of": old, **told(found, stand_ins)}
    learning.rounds.append(entry)
    learning.session.events.emit("exchange", **entry)
    return best


def _close(learning: Learning) -> list[int]:
    """Those that were within reach in some round or look, and are not chosen."""
    close = {layer for entry in learning.rounds for layer in _within_reach(entry)}
    return sorted(close - set(learning.chosen))


def _is_look(entry: dict[str, Any]) -> bool:
    return "instead_of" in entry


def _is_open(entry: dict[str, Any]) -> bool:
    """Whether the race of a round ended with more than the one that it took."""
    return len(_within_reach(entry)) > 1


def _within_reach(entry: dict[str, Any]) -> list[int]:
    """None in a round of a version that did not say."""
    return list(entry.get("close", []))
