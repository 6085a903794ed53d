"""A comparison on disk: saved after every row, resumable, at the end a table, a page and the numbers behind both."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trsp_fast.compare.arms import Arm
from trsp_fast.compare.runner import Comparer, Comparison, removed_by
from trsp_fast.errors import UserError
from trsp_fast.models.families import layer_stack
from trsp_fast.report.comparison import markdown
from trsp_fast.report.comparison_page import write_page
from trsp_fast.run.identity import fingerprint, first_difference, tokens_digest
from trsp_fast.run.output import STATE, resumable_output, write_durably, write_json

_SAVED = "comparison.json"


def compare_into(
    out: str | Path,
    comparer: Comparer,
    arms: Sequence[Arm],
    counts: Sequence[int],
    seeds: Sequence[int],
    about: dict[str, Any],
    *,
    resume: bool = False,
    restart: bool = False,
) -> dict[str, Any]:
    """Run the arms and write `comparison.json`, `comparison.md` and `comparison.html` into the folder `out`.

    Args:
        about: model, data, command and versions, for the readers.
        resume: go on with an interrupted comparison of `out`, given the same model, data and configuration; arms and
            seeds may have been added.
        restart: discard an interrupted one.

    Returns:
        What comparison.json holds: `arms` (the rows), `problems`, `evidence`, `layers` and `about`'s fields.

    Raises:
        UserError: `out` cannot be written or holds something, or the interrupted comparison was another one.
    """
    with resumable_output(out, resume=resume, restart=restart) as stage:
        identity = _identity(comparer)
        state = stage / STATE / _SAVED
        state.parent.mkdir(parents=True, exist_ok=True)
        found = _found(state, identity)

        def save(comparison: Comparison) -> None:
            values = {"identity": identity, **asdict(comparison)}
            write_durably(state, json.dumps(values).encode())

        comparer.done = save
        found = comparer.run(arms, counts, seeds, found)
        layers = len(layer_stack(comparer.model))
        shown = {arm.name: arm.about for arm in arms}
        wanted = {(arm.name, seed, removed_by(arm, count)) for arm in arms for seed in seeds for count in counts}

        def asked_for(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [entry for entry in entries if (entry["arm"], entry["seed"], entry["removed"]) in wanted]

        values = {
            **about,
            "layers": layers,
            "config": comparer.config.to_dict(),
            "about_arms": shown,
            "arms": [_rounded(row) for row in asked_for(found.rows)],
            "problems": asked_for(found.problems),
            "evidence": {key: value for key, value in found.evidence.items() if key.rsplit(" ", 1)[0] in shown},
        }
        write_json(stage / "comparison.json", values)
        (stage / "comparison.md").write_text(markdown(values["arms"], layers, values["problems"]), encoding="utf-8")
        write_page(values, stage / "comparison.html")
        return values


def _identity(comparer: Comparer) -> dict[str, Any]:
    """What an interrupted comparison must share with the one that goes on with it."""
    config = comparer.config.to_dict()
    for name in ("ratio", "num_layers", "layers", "seed", "run"):
        del config[name]
    return {
        "model": fingerprint(comparer.model),
        "tokens": tokens_digest(comparer.windows(0)),
        "evaluation": tokens_digest(comparer.evaluation),
        "other": tokens_digest(comparer.other),
        "config": config,
        "tasks": comparer.tasks_about,
    }


def _found(state: Path, identity: dict[str, Any]) -> Comparison:
    if not state.exists():
        return Comparison()
    try:
        values = json.loads(state.read_text())
        before = values.pop("identity")
        comparison = Comparison(**values)
    except (ValueError, KeyError, TypeError):
        raise UserError("the interrupted comparison's state is damaged; give --restart to begin anew.") from None
    if different := first_difference(before, identity):
        raise UserError(f"the interrupted comparison had {different}; give the same, or --restart to begin anew.")
    return comparison


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 3) if name.startswith("seconds") else value for name, value in row.items()}
