"""comparison.html: the table, what it says, and its plots, in one page without network or JavaScript."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from trsp_fast.report.comparison import by_amount, sentences, summaries, table_head, table_rows
from trsp_fast.report.html import settings, template
from trsp_fast.report.plots import (
    gates_by_step,
    have_moved,
    quality_by_removed,
    quality_by_seconds,
    similarity_by_layer,
    strips,
)


def write_page(values: dict[str, Any], path: Path) -> None:
    """Render what comparison.json holds; see trsp_fast.compare.output."""
    rows, layers = values["arms"], values["layers"]
    page = template("comparison.html.j2").render(
        c=values,
        head=table_head(rows),
        tables=[
            (table_rows(some), [_bold(text) for text in sentences(some, layers, without)])
            for some, without in by_amount(rows, values.get("problems", []))
        ],
        plots=[(plot.caption, Markup(plot.svg)) for plot in plots(values)],
        settings=settings(values),
    )
    path.write_text(page, encoding="utf-8")


class Plot(NamedTuple):
    """One plot of a comparison: SVG text, what it shows, and a name of its own of letters, digits, - and _."""

    name: str
    caption: str
    svg: str


def plots(values: dict[str, Any]) -> list[Plot]:
    """Every plot that the numbers allow."""
    rows, layers = values["arms"], values["layers"]
    found = summaries(rows)
    drawn: list[Plot] = []
    if len({s.removed for s in found if s.removed}) > 1:
        caption = "Quality against the share of layers removed; bars from smallest to largest seed"
        drawn.append(Plot("quality", caption, quality_by_removed(rows, layers)))
    if any(s.removed for s in found):
        caption = "Quality against the seconds of choosing and training"
        drawn.append(Plot("seconds", caption, quality_by_seconds(rows)))
        caption = "Which layers go with most seeds; equal choices are shown once"
        drawn.append(Plot("layers", caption, strips(found, layers)))
    for key, evidence in values["evidence"].items():
        arm, removed = key.rsplit(" ", 1)
        gone: list[int] = next(
            (row["layers"] for row in rows if (row["arm"], str(row["removed"])) == (arm, removed)), []
        )
        name = re.sub(r"\W", "-", key)
        if have_moved(evidence["gates"] or []) and arm in ("trsp", "trsp-paper"):
            caption = f"Gates over the steps of stage 1, {arm}, {removed} layers"
            drawn.append(Plot(f"gates-{name}", caption, gates_by_step(evidence["gates"], gone, name)))
        if arm in ("trsp", "trsp-paper", "lm-then-cut"):
            caption = f"Similarity of each layer's input and output, {arm}, {removed} layers, all on"
            drawn.append(Plot(f"similarity-{name}", caption, similarity_by_layer(evidence["similarity"], gone, name)))
    return drawn


def _bold(text: str) -> Markup:
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text))))
