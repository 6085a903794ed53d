"""What a comparison says: one table, and sentences made from its numbers alone."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OURS = "trsp"
REFERENCE = "dense"


@dataclass(frozen=True, eq=False)
class Summary:
    """One arm at one number of removed layers, over its seeds.

    perplexity, perplexity_other: mean, smallest and largest; other is None without such data.
    difference, difference_other: this arm minus `trsp` on the same seed, mean, smallest and largest; None for `trsp`
        itself, for the dense model, and where a seed is missing.
    layers: as removed with most seeds; `other_layers` of the seeds chose others.
    """

    arm: str
    removed: int
    seeds: int
    layers: list[int]
    other_layers: int
    perplexity: tuple[float, float, float]
    perplexity_other: tuple[float, float, float] | None
    difference: tuple[float, float, float] | None
    difference_other: tuple[float, float, float] | None
    tokens: int
    seconds: float
    seconds_transfer: float
    window_forwards: float
    tasks: dict[str, float]


def summaries(rows: Sequence[dict[str, Any]]) -> list[Summary]:
    """One entry per number of removed layers and arm, best first; the unpruned model before all."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((amount(row), row["arm"]), []).append(row)
    found = [_summary(removed, arm, mine, rows) for (removed, arm), mine in groups.items()]
    return sorted(found, key=lambda s: (s.removed, s.arm != REFERENCE, s.perplexity[0]))


def amount(row: dict[str, Any]) -> int:
    """How many layers are gone; older files say it of arms that remove nothing too."""
    return int(row["removed"]) if row["layers"] else 0


def _summary(removed: int, arm: str, mine: list[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Summary:
    ours = {row["seed"]: row for row in rows if row["arm"] == OURS and row["removed"] == removed}
    paired = mine if arm != OURS and mine and all(row["seed"] in ours for row in mine) else []
    other = mine[0].get("perplexity_other") is not None
    training = [row["seconds_transfer"] for row in mine]  # null: not comparable with other arms
    chosen = [row["layers"] for row in mine]
    layers = max(chosen, key=chosen.count)  # the first of those that most seeds have
    scores = mine[0].get("tasks") or {}
    return Summary(
        arm=arm,
        removed=removed,
        seeds=len(mine),
        layers=layers,
        other_layers=sum(row["layers"] != layers for row in mine),
        perplexity=_spread([row["perplexity"] for row in mine]),
        perplexity_other=_spread([row["perplexity_other"] for row in mine]) if other else None,
        difference=_differences(paired, ours, "perplexity"),
        difference_other=_differences(paired, ours, "perplexity_other") if other else None,
        tokens=mine[0]["tokens"],
        seconds=statistics.median(row["seconds"] for row in mine),
        seconds_transfer=0.0 if None in training else statistics.median(training),
        window_forwards=statistics.mean(row["window_forwards"] for row in mine),
        tasks={task: statistics.mean(row["tasks"][task] for row in mine) for task in scores},
    )


def _differences(
    paired: list[dict[str, Any]], ours: dict[int, dict[str, Any]], what: str
) -> tuple[float, float, float] | None:
    return _spread([row[what] - ours[row["seed"]][what] for row in paired]) if paired else None


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.mean(values), min(values), max(values)


def sentences(rows: Sequence[dict[str, Any]], layers: int, problems: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Who wins where, for each number of removed layers, and what has no row; nothing that the rows do not show.

    One sentence an entry; the first of each number begins with it, in bold.
    """
    found = summaries(rows)
    dense = next((s for s in found if s.arm == REFERENCE), None)
    texts = []
    for removed in sorted({s.removed for s in found if s.removed}):
        here = [s for s in found if s.removed == removed]
        first, *rest = _verdicts(here, dense)
        texts += [f"**{removed} of {layers} layers removed.** {first}", *rest]
    reasons: dict[tuple[str, int, str], list[int]] = {}
    for problem in problems:
        reasons.setdefault((problem["arm"], problem["removed"], problem["reason"]), []).append(problem["seed"])
    for (arm, removed, reason), seeds in reasons.items():
        texts.append(f"No row: {arm}, {removed} layers, seed {', '.join(map(str, seeds))}: {reason}.")
    return texts


def _verdicts(here: list[Summary], dense: Summary | None) -> list[str]:
    best = here[0]
    texts = [f"Lowest perplexity: {best.arm}, {_range(best.perplexity)} ({_seeds(best.seeds)})."]
    ours = next((s for s in here if s.arm == OURS), None)
    if ours is not None:
        texts += _against_ours({s: s.difference for s in here}, "trsp is")
        others = [(s.perplexity_other, s) for s in here if s.perplexity_other]
        if ours.perplexity_other is not None and len(others) == len(here):  # else the lowest of some would say little
            other, first = min(others, key=lambda one: one[0][0])
            own = "" if first is ours else f"; trsp has {_range(ours.perplexity_other)}"
            whole = dense.perplexity_other if dense is not None else None
            beside = f", the unpruned model {_range(whole)}" if whole else ""
            texts.append(f"On the other domain the lowest is {first.arm}, {_range(other)}{own}{beside}.")
            texts += _against_ours({s: s.difference_other for s in here}, "There trsp is")
    texts += _published(here)
    texts += _time(here)
    return texts


def _against_ours(differences: dict[Summary, tuple[float, float, float] | None], subject: str) -> list[str]:
    """Whom `trsp` beats and who beats it, on every seed that was run."""
    rivals = {s: difference for s, difference in differences.items() if difference is not None}
    beaten = [s for s, difference in rivals.items() if difference[1] > 0]
    lost = [s for s, difference in rivals.items() if difference[2] < 0]
    open_ = [s for s in rivals if s not in beaten and s not in lost]
    every = " with every seed" if any(s.seeds > 1 for s in rivals) else ""
    return [
        f"{text} {', '.join(f'{s.arm} ({_signed(rivals[s])})' for s in group)}."
        for text, group in (
            (f"{subject} better{every} than", beaten),
            (f"{subject} worse{every} than", lost),
            (f"{subject} neither better nor worse{every} than", open_),
        )
        if group
    ]


def _published(here: list[Summary]) -> list[str]:
    """The paper's recipe against cutting first and spending the same tokens afterwards."""
    paper = next((s for s in here if s.arm == "trsp-paper"), None)
    tuned = [s for s in here if s.arm.startswith("cut-") and s.arm.endswith("-lm")]
    if paper is None or not tuned or not paper.tokens:
        return []
    best = min(tuned, key=lambda s: s.perplexity[0])
    if paper.perplexity[1] > best.perplexity[2]:
        how = "loses to"
    elif paper.perplexity[2] < best.perplexity[1]:
        how = "beats"
    else:
        how = "overlaps over its seeds with"
    return [
        f"TRSP as published (trsp-paper, {_range(paper.perplexity)}) {how} cutting first and tuning afterwards "
        f"({best.arm}, {_range(best.perplexity)}) at equal tokens."
    ]


def _time(here: list[Summary]) -> list[str]:
    """Our stage 2 against training on the language model loss alone, which sees as many tokens."""
    ours = next((s for s in here if s.arm == OURS), None)
    plain = next((s for s in here if s.arm == "lm-then-cut"), None)
    if ours is None or plain is None or not (ours.seconds_transfer and plain.seconds_transfer):  # null: not comparable
        return []
    share = ours.seconds_transfer / plain.seconds_transfer
    return [f"Training as trsp does takes {share:.2f} times as long as lm-then-cut on as many tokens."]


def _range(values: tuple[float, float, float]) -> str:
    mean, low, high = (f"{value:,.2f}" for value in values)
    return mean if low == high else f"{mean} ({low} to {high})"


def _signed(values: tuple[float, float, float] | None) -> str:
    return "" if values is None else f"{values[0]:+.2f}"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


HEAD = ("arm", "removed layers", "perplexity", "other domain", "minus trsp, paired", "tokens", "seconds", "forwards")


def table_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table's cells, as `HEAD` names them: mean and range over the seeds, medians of seconds; then the tasks."""
    table = []
    for s in summaries(rows):
        layers = ", ".join(map(str, s.layers)) or "none"
        cells = (
            s.arm,
            layers + (f" (other ones in {s.other_layers} of {s.seeds})" if s.other_layers else ""),
            _range(s.perplexity),
            _range(s.perplexity_other) if s.perplexity_other else "-",
            f"{s.difference[0]:+.2f} ({s.difference[1]:+.2f} to {s.difference[2]:+.2f})" if s.difference else "-",
            f"{s.tokens:,}",
            f"{s.seconds:.0f}",
            f"{s.window_forwards:,.0f}",
        )
        table.append((*cells, *(f"{score:.3f}" for score in s.tasks.values())))
    return table


def table_head(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """`HEAD` and the tasks that were scored."""
    return (*HEAD, *(rows[0].get("tasks") or {})) if rows else HEAD


def by_amount(
    rows: Sequence[dict[str, Any]], problems: Sequence[dict[str, Any]] = ()
) -> list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Rows and problems for each number of removed layers; those of arms that remove nothing are in all of them."""
    counts = sorted({*map(amount, rows), *(one["removed"] for one in problems)} - {0}) or [0]
    return [
        (
            [row for row in rows if amount(row) in (0, count)],
            [one for one in problems if one["removed"] in (0, count)],
        )
        for count in counts
    ]


def bullets(texts: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"* {text}" for text in texts)


def markdown(rows: Sequence[dict[str, Any]], layers: int, problems: Sequence[dict[str, Any]] = ()) -> str:
    """A table for each number of removed layers and what it says, as Markdown."""
    head = table_head(rows)
    parts = []
    for some, without in by_amount(rows, problems):
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(cells) + " |" for cells in table_rows(some)]
        parts += ["\n".join(lines), bullets(sentences(some, layers, without))]
    return "\n\n".join(parts) + "\n"
