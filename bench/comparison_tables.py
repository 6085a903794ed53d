"""The README's tables of comparisons: models and budgets, learning rates, the choice, the parts of stage 2."""

import json
import math
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from results_page import RESULTS, other_settings, quarter

from trsp_fast.report.comparison import HEAD, Summary, amount, bullets, sentences, summaries, table_rows


def comparison() -> str:
    """The arms on the built-in model at a quarter of its layers, best first, and what their numbers say."""
    content = json.loads((RESULTS / "compare_demo.json").read_text())
    rows = [row for row in content["arms"] if amount(row) in (0, quarter(content))]
    problems = [one for one in content.get("problems", []) if one["removed"] in (0, quarter(content))]
    columns = [
        HEAD.index(name) for name in ("arm", "removed layers", "perplexity", "other domain", "minus trsp, paired")
    ]
    table = [HEAD, *table_rows(rows)]
    lines = ["| " + " | ".join(row[column] for column in columns) + " |" for row in table]
    lines.insert(1, "|" + "---|" * len(columns))
    return "\n".join(lines) + "\n\n" + bullets(sentences(rows, content["layers"], problems))


def comparisons() -> str:
    """Every model and budget that was compared: ours beside the best rival, with and without training."""
    lines: dict[tuple[str, int, int], str] = {}
    lost: list[str] = []
    elsewhere: list[bool] = []  # whether ours has the lowest mean on the other domain
    head = [
        "| model | removed | tokens | seeds | dense | `trsp` | best rival that trains | `trsp-fold`, untrained "
        "| best untrained rival |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for file in sorted(RESULTS.glob("compare_*.json")):
        content = json.loads(file.read_text())
        found = {(entry.removed, entry.arm): entry for entry in summaries(content["arms"])}
        name = subject(file, content)
        for removed in sorted({removed for removed, _ in found if removed}):
            here = {arm: entry for (count, arm), entry in found.items() if count == removed}
            trained = [entry for arm, entry in here.items() if is_rival(arm) and entry.tokens]
            untrained = [entry for arm, entry in here.items() if is_rival(arm) and not entry.tokens]
            cells = [name, f"{removed} of {content['layers']}", f"{here['trsp'].tokens:,}"]
            cells.append(str(here["trsp"].seeds))
            cells += [f"{found[0, 'dense'].perplexity[0]:,.2f}", f"{here['trsp'].perplexity[0]:,.2f}"]
            cells += [best(trained), best([here["trsp-fold"]] if "trsp-fold" in here else []), best(untrained)]
            lines[name, removed, here["trsp"].tokens] = "| " + " | ".join(cells) + " |"
            if not all(entry.perplexity_other is None for entry in trained):
                elsewhere.append(is_lowest_elsewhere(here["trsp"], [*trained, *untrained]))
            lost += [f"`{arm}` ({name}, {removed} layers)" for arm in not_beaten(content["arms"], removed)]
    said = f"but {', '.join(lost)}" if lost else "in all rows"
    table = "\n".join([*head, *(lines[key] for key in sorted(lines))])
    other = (
        f"On text of another domain it has the lowest mean in {sum(elsewhere)} of {len(elsewhere)} rows that have one."
    )
    return f"{table}\n\n`trsp` is better than every rival with every seed {said}. {other}"


def subject(file: Path, content: dict[str, Any]) -> str:
    """What was pruned, on what text and machine if they are not the usual ones."""
    name, *more = file.stem.removeprefix("compare_").split("_")
    name += ", unseen text" if "unseen" in more else ""
    name += ", H200" if "h200" in more else ""
    return name + (", older defaults" if other_settings(content["config"]) else "")


def is_lowest_elsewhere(ours: Summary, rivals: list[Summary]) -> bool:
    """By the mean on text of another domain; rivals without one do not count."""
    others = [entry.perplexity_other[0] for entry in rivals if entry.perplexity_other]
    return ours.perplexity_other is not None and all(ours.perplexity_other[0] < value for value in others)


def choices() -> str:
    """Layers and perplexity of the direct cut beside SLEB's, and what each choice costs, over the seeds."""
    head = [
        "| model | removed | seeds | `trsp` takes | SLEB takes | `trsp` | SLEB | difference | forward passes "
        "| of our SLEB's | of a SLEB's on whole passes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines, farthest, dearest = [], (-math.inf, ""), (-math.inf, "")
    for file in sorted(RESULTS.glob("choice_*.json")):
        content, name = json.loads(file.read_text()), file.stem.removeprefix("choice_")
        compared = json.loads((RESULTS / f"compare_{name}.json").read_text())["arms"]
        windows = next(row["window_forwards"] for row in compared if row["arm"] == "cut-shortgpt-distill")  # each once
        name, total = name.replace("_unseen", ", unseen text"), content["layers"]
        for removed in sorted({amount(row) for row in content["arms"]} - {0}):
            pair = [
                sorted((row for row in content["arms"] if (row["arm"], row["removed"]) == (arm, removed)), key=_seed)
                for arm in ("trsp-untrained", "sleb")
            ]
            (_, own_layers, own, *_), (_, layers, other, *_) = (table_rows(rows)[0] for rows in pair)
            apart = [a["perplexity"] / b["perplexity"] - 1 for a, b in zip(*pair, strict=True)]
            passes, rival = (mean(row["window_forwards"] for row in rows) for rows in pair)
            whole = passes / (windows * sum(total - gone for gone in range(removed)))
            cells = [name, f"{removed} of {total}", str(len(apart)), own_layers, layers, own, other, _percent(apart)]
            cells += [f"{passes:,.0f}", f"{passes / rival:.2f}", f"{whole:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
            place = f"{name}, {removed} of {total}"
            farthest, dearest = max(farthest, (max(apart), place)), max(dearest, (whole, place))
    said = (
        f"With no seed is the direct cut more than {farthest[0]:.1%} worse than SLEB's ({farthest[1]}); a choice "
        f"takes at most {dearest[0]:.2f} of a SLEB's whole passes ({dearest[1]})."
    )
    return "\n".join([*head, *lines]) + "\n\n" + said


def _seed(row: dict[str, Any]) -> int:
    return int(row["seed"])


def _percent(values: list[float]) -> str:
    """Mean, and in brackets smallest and largest where they differ."""
    texts = [f"{value:+.1%}".replace("-0.0%", "+0.0%") for value in (mean(values), min(values), max(values))]
    return texts[0] if texts[1] == texts[2] else f"{texts[0]} ({texts[1]} to {texts[2]})"


AT_RATES = "trsp-even-lr"  # the rate of all its layers is the one that the rivals have


def rates() -> str:
    """`AT_RATES` and the best rival that trains at several rates, on the same seeds; not every rate was run."""
    names = sorted({file.stem.split("_")[1] for file in RESULTS.glob("rate_*.json")})
    rows = [row for name in names for row in _at_rates(name)]
    used = sorted({rate for row in rows for rate in row.ours})
    lines = [
        "| model | removed | seeds | " + " | ".join(f"`{AT_RATES}`, {r:g} | best rival, {r:g}" for r in used) + " |",
        "|" + "---|" * (3 + 2 * len(used)),
    ]
    won = 0
    for row in rows:
        cells = [row.model, row.removed, str(row.seeds)]
        for rate in used:
            found = rate in row.ours
            cells += [f"{row.ours[rate]:,.2f}", "{:,.2f} (`{}`)".format(*row.rival[rate])] if found else ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
        won += min(row.ours.values()) < min(row.rival.values())[0]
    said = f"Each with the best of its rates, `{AT_RATES}` is lower than every rival in {won} of {len(rows)} rows."
    return "\n".join(lines) + f"\n\n{said}"


class AtRates(NamedTuple):
    """Of one model and number of removed layers, by rate: mean of `AT_RATES`, and the best rival's with its name."""

    model: str
    removed: str
    seeds: int
    ours: dict[float, float]
    rival: dict[float, tuple[float, str]]


def _at_rates(name: str) -> list[AtRates]:
    """The arms and seeds that every rate has; the default's are of the comparison itself where it has no file."""
    files = [RESULTS / f"compare_{name}.json", *sorted(RESULTS.glob(f"rate_{name}_*.json"))]
    contents = [json.loads(file.read_text()) for file in files]
    at = {content["config"]["transfer"]["lr"]: content for content in contents}  # the later one of two
    found: dict[tuple[int, str, int], dict[float, float]] = {}
    for rate, content in at.items():
        for row in content["arms"]:
            if row["tokens"] and (row["arm"] == AT_RATES or is_rival(row["arm"])):
                found.setdefault((row["removed"], row["arm"], row["seed"]), {})[rate] = row["perplexity"]
    everywhere = {key: values for key, values in found.items() if len(values) == len(at)}
    rows = []
    for removed in sorted({removed for removed, _, _ in everywhere}):
        here = {(arm, seed): values for (count, arm, seed), values in everywhere.items() if count == removed}
        seeds = {seed for arm, seed in here if arm == AT_RATES}
        if not seeds:
            continue
        means = {
            arm: {rate: mean(here[arm, seed][rate] for seed in seeds) for rate in at}
            for arm in {arm for arm, _ in here}
            if all((arm, seed) in here for seed in seeds)
        }
        ours = means.pop(AT_RATES)
        best_of = {rate: min((values[rate], arm) for arm, values in means.items()) for rate in ours}
        rows.append(AtRates(name, f"{removed} of {contents[0]['layers']}", len(seeds), ours, best_of))
    return rows


def parts() -> str:
    """What it costs to leave a part of the method out, held-out and on the other domain, on the same seeds."""
    names = ("trsp-judge-cut", "trsp-even-lr", "trsp-no-noise", "trsp-no-fold", "trsp-no-hidden")
    lines = [
        "| model | removed | tokens | `trsp` | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---" * (4 + len(names)) + "|",
    ]
    for file in sorted(RESULTS.glob("compare_*.json")):
        content = json.loads(file.read_text())
        found = {(entry.removed, entry.arm): entry for entry in summaries(content["arms"])}
        for removed in sorted({removed for removed, arm in found if arm in names}):
            whole = found[removed, "trsp"]
            cells = [subject(file, content), f"{removed} of {content['layers']}", f"{whole.tokens:,}"]
            cells.append(f"{whole.perplexity[0]:,.2f}" + _beside(whole.perplexity_other, "{:,.1f}"))
            for name in names:
                one = found.get((removed, name))
                cells.append("-" if one is None or one.difference is None else _change(one))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _change(one: Summary) -> str:
    """By how much the arm is above `trsp`, as a share of what `trsp` has with the same seeds."""
    assert one.difference is not None
    other = None
    if one.difference_other and one.perplexity_other:
        other = (_share(one.difference_other[0], one.perplexity_other[0]),)
    return f"{_share(one.difference[0], one.perplexity[0]):+.1%}" + _beside(other, "{:+.1%}")


def _share(difference: float, total: float) -> float:
    return difference / (total - difference)


def _beside(values: tuple[float, ...] | None, form: str) -> str:
    return "" if values is None else f" ({form.format(values[0])})"


def not_beaten(rows: list[dict[str, Any]], removed: int) -> list[str]:
    """The rivals that are as good as `trsp` with some seed, the arms of 0 removed layers apart."""
    here = [row for row in rows if row["removed"] == removed and row["layers"]]
    ours = {row["seed"]: row["perplexity"] for row in here if row["arm"] == "trsp"}
    return sorted({r["arm"] for r in here if is_rival(r["arm"]) and r["perplexity"] <= ours.get(r["seed"], math.inf)})


def is_rival(arm: str) -> bool:
    """Neither ours nor a rival's choice with our stage 2; the published recipe is one."""
    ours = arm.startswith(("trsp", "cut-trsp", "dense")) or arm.endswith(("-imitate", "-fold"))
    return arm in ("trsp-paper", "trsp-l1") or not ours


def best(entries: list[Summary]) -> str:
    if not entries:
        return "-"
    lowest = min(entries, key=lambda entry: entry.perplexity[0])
    name = "" if lowest.arm == "trsp-fold" else f" (`{lowest.arm}`)"
    return f"{lowest.perplexity[0]:,.2f}{name}"
