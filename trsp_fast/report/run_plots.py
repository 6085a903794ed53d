"""The plots of report.html, from the numbers of report.json; each is left out where its numbers are not there."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from trsp_fast.report.plots import (
    COLOURS,
    INK,
    figure,
    gates_by_step,
    have_moved,
    legend,
    similarity_by_layer,
    whole_steps,
)

PERPLEXITIES = {
    "dense": "as it came",
    "cut": "cut, no stage 2",
    "transferred": "stage 2, all layers on",
    "pruned": "the result",
}
LOSSES = {"loss": "loss", "lm_loss": "language model", "penalty": "penalty", "hidden": "hidden states"}


def run_plots(report: dict[str, Any]) -> dict[str, Markup]:
    """SVG by name: `perplexity`, `gates`, `losses`, `distances`, `similarity`.

    Reports of version 0.1.0's first days have none of the gates and similarities.
    """
    removed = report["removed_layers"]
    gates = report["selection"].get("gates") or []
    values = [entry["gates"] for entry in gates]
    steps, similarity = report["transfer"], report.get("similarity") or {}
    drawn: dict[str, str] = {}
    if any(report["perplexity"].get(name) for name in PERPLEXITIES):
        drawn["perplexity"] = perplexity_bars(report["perplexity"])
    if len(gates) > 1 and have_moved(values):
        drawn["gates"] = gates_by_step(values, removed, "run", [entry["step"] + 1 for entry in gates])
    if len(steps) > 1:
        drawn["losses"] = losses_by_step(steps)
        if any(_known(_distances(steps, layer)) for layer in removed):
            drawn["distances"] = distances_by_step(steps, removed)
    if similarity:
        drawn["similarity"] = similarity_by_layer(
            {f"{when} stage 2": values for when, values in similarity.items()}, removed, "run"
        )
    return {name: Markup(svg) for name, svg in drawn.items()}


def perplexity_bars(perplexity: dict[str, float | None]) -> str:
    """A bar for each model, from the dense one on; logarithmic where the cut alone ruins it."""
    shown = {PERPLEXITIES[name]: value for name in PERPLEXITIES if (value := perplexity.get(name))}
    values = list(shown.values())
    steep = max(values) > 20 * min(values)
    with figure("perplexity", height=0.9 + 0.4 * len(shown)) as (_, axes, result):
        bars = axes.barh(list(shown), values, height=0.6, color=COLOURS[: len(shown)])
        axes.bar_label(bars, [f"{value:,.2f}" for value in values], padding=4, color=INK)
        axes.set(xlabel="perplexity, logarithmic" if steep else "perplexity", xscale="log" if steep else "linear")
        axes.set_xlim(min(values) / 2 if steep else 0, max(values) * (4 if steep else 1.25))
        axes.invert_yaxis()
    return result[0]


def losses_by_step(steps: Sequence[dict[str, Any]]) -> str:
    """The loss of stage 2 and its parts; parts that are nothing throughout are left out."""
    with figure("losses") as (drawn, axes, result):
        for colour, (name, label) in zip(COLOURS, LOSSES.items(), strict=False):
            values = _numbers([entry.get(name) for entry in steps])
            if any(value > 0 for value in values):
                axes.plot([entry["step"] + 1 for entry in steps], values, color=colour, label=label, linewidth=1.4)
        axes.set(xlabel="step of stage 2", ylabel="loss", ylim=(0, None))
        whole_steps(axes)
        legend(drawn)
    return result[0]


def distances_by_step(steps: Sequence[dict[str, Any]], removed: Sequence[int]) -> str:
    """D of each removed layer: how much it still does to its input."""
    with figure("distances") as (drawn, axes, result):
        for index, layer in enumerate(removed):
            style = ("-", "--", ":")[index // len(COLOURS) % 3]
            axes.plot(
                [entry["step"] + 1 for entry in steps],
                _distances(steps, layer),
                color=COLOURS[index % len(COLOURS)],
                linestyle=style,
                linewidth=1.4,
                label=f"layer {layer}",
            )
        axes.set(xlabel="step of stage 2", ylabel="D of input and output", ylim=(0, None))
        whole_steps(axes)
        legend(drawn)
    return result[0]


def _distances(steps: Sequence[dict[str, Any]], layer: int) -> list[float]:
    return _numbers([entry["D"].get(str(layer), entry["D"].get(layer)) for entry in steps])


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _known(values: Sequence[float]) -> bool:
    return not all(map(math.isnan, values))
