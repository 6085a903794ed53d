"""Writes the README's tables of measured figures from bench/results/*.json; --check says whether they are in step.

python bench/readme_table.py [--check]
"""

import argparse
import json
import sys
from statistics import median
from typing import Any

from comparison_tables import choices, comparison, comparisons, parts, rates
from results_page import RESULTS, ROOT

BEGIN, END = "<!-- {}: begin, written by bench/readme_table.py -->", "<!-- {}: end -->"
# The size that stands for a machine, the first one that its file has.
SIZES = ((16384, 4096), (2048, 4096))
DTYPES = ("bf16", "fp32")
CASES = {"output, penalty": "output mode", "residual, penalty": "residual mode", "norms only": "norms only"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, end with status 1 where README differs")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = written = readme.read_text()
    for name, section in SECTIONS.items():
        written = replaced(written, name, section())
    if written == text:
        return
    if arguments.check:
        sys.exit("README.md's tables are not those of bench/results: run python bench/readme_table.py.")
    readme.write_text(written)


def replaced(text: str, name: str, section: str) -> str:
    """The text with this section between the two comments that carry its name."""
    begin, end = BEGIN.format(name), END.format(name)
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"README.md has no lines '{begin}' and '{end}' to write between.")
    return f"{before}{begin}\n{section}\n{end}{after}"


def surgery() -> str:
    """Removal on disk beside cp and beside loading and saving, one line per file system."""
    lines = [
        "| file system | bytes that stay | shared | copied | ours | `cp` + `sync` | load + save with transformers |",
        "|---|---|---|---|---|---|---|",
    ]
    for file in sorted(RESULTS.glob("surgery_*.json")):
        content = json.loads(file.read_text())
        seconds = {row["arm"]: median(row["seconds"]) for row in content["rows"]}
        ours = seconds["on disk"]
        others = [f"{seconds[arm]:.2f} s ({seconds[arm] / ours:.1f}x)" for arm in ("cp + sync", "load + save")]
        amounts = [f"{content[name] / 1e9:.2f} GB" for name in ("kept_bytes", "shared_bytes", "copied_bytes")]
        kind = file.stem.removeprefix("surgery_")
        lines.append("| " + " | ".join([kind, *amounts, f"{ours:.3g} s", *others]) + " |")
    return "\n".join(lines)


def kv_cache() -> str:
    """The moves of a cache beside a copy of as many bytes and beside building a smaller cache."""
    lines = [
        "| machine | tokens held of those that fit | move | time | GB/s | of a copy | building a smaller cache takes |",
        "|---|---|---|---|---|---|---|",
    ]
    for file in sorted(RESULTS.glob("kv_cache_*.json")):
        content = json.loads(file.read_text())
        for row in content["rows"]:
            if row["step"] in ("compact", "regrid"):
                held = f"{row['filled']} of {content['tokens']}"
                cells = [content["machine"]["device"], held, f"`{row['step']}`", f"{row['median_ms']:.3g} ms"]
                cells += [f"{row['gb_per_s']:.0f}", f"{row['of_copy']:.0%}", f"{row['rebuild_over_ours']:.1f}x"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps() -> str:
    """Stages of a run beside the plain port of the published recipe."""
    names = {"select": "stage 1", "transfer": "stage 2", "whole": "both"}
    lines = [
        "| machine, model | settings | part | plain port, a step | ours | times as fast | memory, plain | ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file in sorted(RESULTS.glob("step_*.json"), key=lambda file: "cpu" in file.name):
        content = json.loads(file.read_text())
        rows = {(row["model"], row["part"], row["arm"]): row for row in content["rows"]}
        for (model, part, arm), ours in rows.items():
            plain = rows.get((model, part, "plain"))
            if arm.startswith("ours") and plain is not None and plain["step_ms"] and ours["step_ms"]:
                chosen = [*content["settings"], *["run.compile=true"] * (arm == "ours-compiled")]
                settings = ", ".join(f"`{text}`" for text in chosen)
                cells = [f"{content['machine']['device']}, {model}", settings, names[part]]
                cells += [f"{plain['step_ms']:.0f} ms", f"{ours['step_ms']:.0f} ms"]
                cells.append(f"{ours['ratio']:.2f}" if ours["ratio"] else "differ")
                cells += [f"{row['peak_bytes'] / 1e6:.0f} MB" if row["peak_bytes"] else "-" for row in (plain, ours)]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speeds() -> str:
    """The paper's table 2: models without layers beside the whole one."""
    lines = [
        "| machine | model | layers | generating | times as fast | GPU waits | reading the prompt | times as fast "
        "| peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for file in sorted(RESULTS.glob("speed_*.json")):
        for run in json.loads(file.read_text())["runs"]:
            for model in run["models"]:
                made, read = model["generation"]["dynamic"], model["latency"]
                cells = [run["machine"]["device"], model["model"].partition(" ")[0], str(model["layers"])]
                cells += [
                    f"{made['tokens_per_second']:,.0f} tokens/s",
                    f"{made['times_first']:.2f}",
                    f"{made['host_bound']:.0%}",
                ]
                cells += [f"{read['seconds'] * 1e3:.1f} ms", f"{read['times_first']:.2f}"]
                lines.append("| " + " | ".join([*cells, f"{made['peak_bytes'] / 1e9:.1f} GB"]) + " |")
    return "\n".join(lines)


def tables() -> str:
    """One table per machine that has results, GPUs first."""
    files = [file for file in sorted(RESULTS.glob("kernels_*.json")) if "fresh_memory" not in file.name]
    files.sort(key=lambda file: "cpu" in file.name)
    contents = [(json.loads(file.read_text()), file.name) for file in files]
    return "\n\n".join(table(content, name) for content, name in contents if content["rows"])


def table(content: dict[str, Any], name: str) -> str:
    """Medians of forward and backward of one size, as times eager, times torch.compile and share of a copy."""
    machine = content["machine"]
    wanted = {(r["tokens"], r["hidden"]) for r in content["rows"]}
    tokens, hidden = next((size for size in SIZES if size in wanted), min(wanted))
    rows = {
        (r["case"], r["dtype"], r["pass"], r["provider"]): r
        for r in content["rows"]
        if (r["tokens"], r["hidden"]) == (tokens, hidden)
    }
    lines = [
        f"**{machine['device']}**, torch {machine['torch']}, {machine['date']}: {tokens} tokens x {hidden}, "
        f"{count(content['processes'], 'process')}, memory {content['memory']} (`bench/results/{name}`)",
        "",
        "| op | dtype | pass | eager | `torch.compile` | ours | x eager | x `torch.compile` | GB/s | of a copy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, label in CASES.items():
        for dtype in DTYPES:
            for which in ("forward", "backward"):
                found = {p: rows.get((case, dtype, which, p)) for p in ("eager", "compile", "ours")}
                if found["ours"] is not None:
                    lines.append(line(label, dtype, which, found))
    return "\n".join(lines)


def count(number: int, what: str) -> str:
    return f"{number} {what}" + ("es" if number != 1 else "")


def line(label: str, dtype: str, which: str, found: dict[str, dict[str, Any] | None]) -> str:
    ours = found["ours"]
    assert ours is not None
    times, ratios = [], []
    for other in ("eager", "compile"):
        row = found[other]
        times.append(f"{row['median_ms']:.3g} ms" if row else "-")
        honest = row is not None and row["correct"] and ours["correct"]
        ratios.append(f"{row['median_ms'] / ours['median_ms']:.1f}" if row and honest else "-")
    if not ours["correct"]:
        return f"| {label} | {dtype} | {which} | wrong results: no figures |"
    cells = [label, dtype, which, *times, f"{ours['median_ms']:.3g} ms", *ratios]
    return "| " + " | ".join([*cells, f"{ours['gb_per_s']:.0f}", f"{ours['of_copy']:.0%}"]) + " |"


SECTIONS = {
    "comparison": comparison,
    "comparisons": comparisons,
    "parts": parts,
    "choices": choices,
    "rates": rates,
    "performance": tables,
    "surgery": surgery,
    "kv cache": kv_cache,
    "steps": steps,
    "speeds": speeds,
}

if __name__ == "__main__":
    main()
