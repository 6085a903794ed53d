"""report.html: one self-contained page, readable without JavaScript or network."""

from pathlib import Path
from typing import Any

import jinja2

from trsp_fast.report.record import thinned
from trsp_fast.report.run_plots import run_plots

ROWS = 24  # steps of stage 2 that the table shows; the plots show them all


def write_report(report: dict[str, Any], path: Path) -> None:
    """Render the numbers of report.json as a page."""
    page = template("report.html.j2").render(
        r=report,
        headline=headline(report),
        plots=run_plots(report),
        steps=thinned(report["transfer"], ROWS),
        settings=settings(report),
    )
    path.write_text(page, encoding="utf-8")


def template(name: str) -> jinja2.Template:
    """A page of this folder; it may include others."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trsp_fast", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["size"] = size_text
    environment.filters["figure"] = figure_text
    environment.filters["distance"] = distance_text
    environment.filters["licence"] = licence_text
    return environment.get_template(name)


def headline(report: dict[str, Any]) -> str:
    """What was removed, what it cost, what it gained, is the export proven: one sentence."""
    removed, perplexity, speed = report["removed_layers"], report["perplexity"], report["speed"]
    parts = [f"{len(removed)} of {report['layers_before']} layers removed"]
    if perplexity.get("dense") and perplexity.get("pruned"):
        parts.append(f"perplexity {perplexity['dense']:.2f} → {perplexity['pruned']:.2f}")
    if speed:  # divided weights are not measured
        gain = speed["pruned"]["generated_tokens_per_second"] / speed["dense"]["generated_tokens_per_second"]
        parts.append(f"generation {gain:.2f} times as fast")
    parts.append("export proven" if report["proven"] else "export NOT proven")
    return ", ".join(parts) + "."


def settings(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The configuration as flat (field, value) rows."""
    rows = []
    for name, value in report["config"].items():
        group = value if isinstance(value, dict) else {"": value}
        rows += [(f"{name}.{key}".rstrip("."), _value_text(inner)) for key, inner in group.items()]
    return rows


def _value_text(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def distance_text(distances: dict[Any, float | None], layer: int) -> str:
    """D of a layer at one step; a dash where it has none."""
    return figure_text(distances.get(str(layer)), 3)


def licence_text(licence: dict[str, Any]) -> str:
    """The licence that the source names; a licence of its own name goes by that."""
    name = licence.get("license_name") or licence.get("license")
    return "unknown" if not name else ", ".join(name) if isinstance(name, list) else name


def size_text(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "not written"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"


def figure_text(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"  # noqa: RUF001
