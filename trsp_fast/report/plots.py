"""Plots as SVG text that stands inside a page: text and axes in the page's own colour, light or dark."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trsp_fast.report.comparison import REFERENCE, Summary, summaries

INK = "#010203"  # stands for the colour of the page's text until the SVG is written
# Distinguishable without red and green; readable on white and on near-black.
COLOURS = ("#3987c9", "#d9792b", "#7f6fc9", "#1c9c86", "#c95f94", "#9a8b1f", "#6f8fa3", "#b3543f")
WIDTH = 5.0  # inches: two beside each other on a screen, text of its own size on a phone
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@contextmanager
def figure(name: str, height: float = 3.6) -> Iterator[tuple[Any, Any, list[str]]]:
    """A matplotlib figure, its axes, and a list that holds its SVG text once the block has ended."""
    import matplotlib
    from cycler import cycler
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=COLOURS),
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    result: list[str] = []
    with matplotlib.rc_context(settings):
        drawn = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(drawn)
        yield drawn, drawn.add_subplot(), result
        buffer = io.StringIO()
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    result.append(_inline(buffer.getvalue(), name))


def _inline(text: str, name: str) -> str:
    """The svg element alone, its names unique in a page, as wide as the page allows; its text keeps one size."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    style = f"width: 100%; max-width: {44 * WIDTH / 7:.3g}rem"
    text = re.sub(r'^<svg ([^>]*?)width="[^"]+"', rf'<svg \1role="img" style="{style}"', text)
    text = re.sub(r'^(<svg [^>]*?)height="[^"]+" ', r"\1", text)
    return text.replace(INK, "currentColor")


def quality_by_removed(rows: Sequence[dict[str, Any]], layers: int) -> str:
    """Perplexity against the share of the layers that are gone, one line per arm; logarithmic."""
    found = summaries(rows)
    with figure("quality") as (drawn, axes, result):
        for index, arm in enumerate(_arms(found)):
            mine = [s for s in found if s.arm == arm]
            share = [100 * s.removed / layers for s in mine]
            _points(axes, index, arm, share, mine, line=True)
        _dense(axes, found)
        axes.set(xlabel="layers removed, %", ylabel="perplexity", yscale="log")
        legend(drawn)
    return result[0]


def quality_by_seconds(rows: Sequence[dict[str, Any]]) -> str:
    """Perplexity against the time of choosing and training, one point per arm and number of layers."""
    found = summaries(rows)
    with figure("seconds") as (drawn, axes, result):
        for index, arm in enumerate(_arms(found)):
            mine = [s for s in found if s.arm == arm]
            _points(axes, index, arm, [max(s.seconds, 0.1) for s in mine], mine, line=False)
        _dense(axes, found)
        axes.set(xlabel="seconds", ylabel="perplexity", xscale="log", yscale="log")
        legend(drawn)
    return result[0]


def strips(found: Sequence[Summary], layers: int) -> str:
    """Which layers each way of choosing removes: a row per arm, a filled square per removed layer."""
    rows: dict[str, list[int]] = {}
    for s in found:
        if s.layers and s.layers not in rows.values():
            rows[f"{s.arm}, {s.removed}"] = s.layers
    with figure("strips", height=0.6 + 0.28 * len(rows)) as (_, axes, result):
        for place, (name, removed) in enumerate(rows.items()):
            for layer in range(layers):
                gone = layer in removed
                face = COLOURS[0] if gone else "none"
                axes.plot(
                    layer, place, "s", markersize=9, markerfacecolor=face, markeredgecolor=INK, markeredgewidth=0.5
                )
            axes.text(-0.9, place, name, ha="right", va="center")
        axes.set(xlabel="layer", xticks=range(0, layers, max(1, layers // 12)), yticks=[], xlim=(-0.7, layers - 0.3))
        axes.invert_yaxis()
        axes.spines["left"].set_visible(False)
    return result[0]


def have_moved(gates: Sequence[Sequence[float | None]]) -> bool:
    """Whether there is anything to draw: with one step a round every gate is told before its only step, at 1."""
    return any(value not in (None, 1.0) for step in gates for value in step)


def gates_by_step(
    gates: Sequence[Sequence[float | None]],
    removed: Sequence[int],
    name: str,
    steps: Sequence[int] | None = None,
) -> str:
    """Every layer's gate over the steps of stage 1; the removed layers in colour, until they are bypassed.

    `steps` counts from 1; all of them by default.
    """
    places = range(1, len(gates) + 1) if steps is None else steps
    with figure(f"gates-{name}") as (drawn, axes, result):
        for layer in range(len(gates[0])):
            values = [step[layer] for step in gates]
            gone = layer in removed
            style = (
                {"color": COLOURS[list(removed).index(layer) % len(COLOURS)], "label": f"layer {layer}"}
                if gone
                else {"color": INK, "alpha": 0.25}
            )
            axes.plot(
                places,
                [float("nan") if v is None else v for v in values],
                linewidth=1.8 if gone else 1,
                **style,
            )
        axes.set(xlabel="step of stage 1", ylabel="gate")
        whole_steps(axes)
        if removed:
            legend(drawn)
    return result[0]


def similarity_by_layer(similarity: dict[str, Sequence[float | None]], removed: Sequence[int], name: str) -> str:
    """Cosine similarity of each layer's input and output before and after stage 2; removed layers are marked."""
    with figure(f"similarity-{name}", height=3.0) as (drawn, axes, result):
        for index, (when, values) in enumerate(similarity.items()):
            shown = [float("nan") if v is None else v for v in values]
            axes.plot(range(len(values)), shown, marker=MARKERS[index], color=COLOURS[index], label=when)
        for layer in removed:
            axes.axvspan(layer - 0.4, layer + 0.4, color=INK, alpha=0.08, linewidth=0)
        axes.set(xlabel="layer (shaded: removed)", ylabel="cosine of input and output")
        whole_steps(axes)
        legend(drawn)
    return result[0]


def _arms(found: Sequence[Summary]) -> list[str]:
    return [arm for arm in dict.fromkeys(s.arm for s in found) if arm != REFERENCE]


def _points(axes: Any, index: int, arm: str, places: list[float], mine: list[Summary], *, line: bool) -> None:
    means = [s.perplexity[0] for s in mine]
    errors = [[s.perplexity[0] - s.perplexity[1] for s in mine], [s.perplexity[2] - s.perplexity[0] for s in mine]]
    axes.errorbar(
        places,
        means,
        yerr=errors,
        marker=MARKERS[index % len(MARKERS)],
        color=COLOURS[index % len(COLOURS)],
        linestyle=("-", "--", ":")[index // len(COLOURS) % 3] if line else "none",
        linewidth=1.2,
        capsize=2,
        label=arm,
    )


def _dense(axes: Any, found: Sequence[Summary]) -> None:
    for s in found:
        if s.arm == REFERENCE:
            axes.axhline(s.perplexity[0], color=INK, linewidth=0.8, linestyle=":", label="dense")


def legend(drawn: Any) -> None:
    """Below the plot, whose width a phone has too."""
    drawn.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9, columnspacing=1.2)


def whole_steps(axes: Any) -> None:
    """Ticks at whole numbers: there is no half step and no half layer."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
