"""Writes the README's performance table from bench/results/kernels_*.json; --check says whether it is in step.

python bench/readme_table.py [--check]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- performance: begin, written by bench/readme_table.py -->", "<!-- performance: end -->"
# The size that stands for a machine, the first one that its file has.
SIZES = ((16384, 4096), (2048, 4096))
DTYPES = ("bf16", "fp32")
CASES = {"output, penalty": "output mode", "residual, penalty": "residual mode", "norms only": "norms only"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, end with status 1 where README differs")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        sys.exit(f"README.md has no lines '{BEGIN}' and '{END}' to write between.")
    written = f"{before}{BEGIN}\n{tables()}\n{END}{after}"
    if written == text:
        return
    if arguments.check:
        sys.exit("README.md's performance table is not that of bench/results: run python bench/readme_table.py.")
    readme.write_text(written)


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
        f"**{machine['device']}**, {machine['threads']} threads, torch {machine['torch']}, {machine['date']}: {tokens} "
        f"tokens x {hidden}, memory {content['memory']} (`bench/results/{name}`)",
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


if __name__ == "__main__":
    main()
