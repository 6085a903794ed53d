"""docs/results.md, generated from bench/results/compare_*.json."""

import json
from pathlib import Path
from typing import Any

from trsp_fast.report.comparison import markdown
from trsp_fast.report.comparison_page import plots

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "results.md"
PLOTS = ROOT / "docs" / "plots"

INTRODUCTION = """# Results

Every number here is from a file in bench/results and was written by `python bench/compare_all.py`; the text under
each table is made from its numbers. In one table all arms that train have the same tokens in the same order, the same
passes, optimiser, learning rate, warm-up and clipping; a row says what they minimise and when the layers leave.
Perplexity is on text that nothing was calibrated on, in brackets the smallest and largest seed. *Minus trsp* is the
mean of the differences to `trsp` on the same seed: above zero `trsp` is better. *Forwards* is the cost of the choice in
forward passes of one window, a backward pass counting two. The last table says what an arm is. The learning rate is one
for all arms, so `trsp-paper` has not the published 2e-5, at which weights of so small a model hardly move.

Small models say little about large ones: nothing here was measured on a model above 27 million parameters.
"""


def write_page() -> Path:
    """Write docs/results.md and its plots; the page's path."""
    PLOTS.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    for path in sorted(RESULTS.glob("compare_*.json")):
        for plot in plots(json.loads(path.read_text())):
            target = PLOTS / f"{path.stem}-{plot.name}.svg"
            target.write_text(plot.svg.replace("currentColor", "#6b7280") + "\n", encoding="utf-8")
    return PAGE


def page() -> str:
    """The page's text."""
    parts, about = [INTRODUCTION], {}
    for path in sorted(RESULTS.glob("compare_*.json")):
        values = json.loads(path.read_text())
        about |= values["about_arms"]
        parts.append(_section(path, values))
    rows = [f"| `{name}` | {text} |" for name, text in about.items()]
    parts.append("\n".join(["## The arms", "", "| arm | what it is |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _section(path: Path, values: dict[str, Any]) -> str:
    config, rows, versions = values["config"], values["arms"], values["versions"]
    trained = max(row["tokens"] for row in rows)
    other = f", another domain {values['evaluation_data']}" if values["evaluation_data"] else ""
    facts = (
        f"{values['layers']} layers; calibrated on {values['data']}, {trained:,} tokens in "
        f"{config['transfer']['epochs']} passes at learning rate {config['transfer']['lr']:g}; evaluated on its "
        f"held-out part{other}. torch {versions['torch']}, transformers {versions['transformers']}; "
        f"`{values['command']}` (`bench/results/{path.name}`)."
    )
    if "note" in values:
        facts += f" {values['note']}"
    images = "\n\n".join(
        f"{plot.caption}:\n\n![{plot.name}](plots/{path.stem}-{plot.name}.svg)" for plot in plots(values)
    )
    return f"## {values['model']}\n\n{facts}\n\n{markdown(rows, values['layers'])}\n{images}\n"
