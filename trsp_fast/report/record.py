"""What report.json holds: every number that the page and the model card show."""

import math
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.models.verify import Check
from trsp_fast.report.origin import origin
from trsp_fast.select import Selection

POINTS = 200  # of a history at most: more cannot be told apart in a plot


@dataclass(frozen=True)
class Outcome:
    """What a run knows at its end.

    about: what the caller says of model, data and command.
    model: with all layers, as stage 2 left it.
    history: `select` and `transfer`, one entry per step; `fold`, one per folded layer.
    similarity: cosine of each layer's input and output, `before` and, where it trained, `after` stage 2.
    weight_bytes: `dense`, `pruned` and `checkpoint`, the last one None if nothing was written.
    """

    about: dict[str, Any]
    config: TRSPConfig
    model: PreTrainedModel
    layers_before: int
    selection: Selection
    history: dict[str, list[dict[str, Any]]]
    perplexity: dict[str, float]
    similarity: dict[str, list[float]]
    speed: dict[str, dict[str, float]]
    parameters: dict[str, int]
    weight_bytes: dict[str, int | None]
    checks: list[Check]
    tokens: Tensor
    evaluation: Tensor | None
    seconds: dict[str, float]
    run: dict[str, Any]


def report_of(outcome: Outcome) -> dict[str, Any]:
    """The report as JSON has it: names are text, and what is not finite is None."""
    config, selection, history = outcome.config, outcome.selection, outcome.history
    removed = sorted(selection.layers)
    return _plain(
        {
            "model": outcome.model.config.name_or_path or type(outcome.model).__name__,
            "data": None,
            "evaluation_data": None,
            "command": None,
            **outcome.about,
            **origin(outcome.model.config),
            "removed_layers": removed,
            "order_of_choice": selection.layers,
            "layers_before": outcome.layers_before,
            "layers_after": outcome.layers_before - len(removed),
            "parameters": outcome.parameters,
            "weight_bytes": outcome.weight_bytes,
            "perplexity": outcome.perplexity,
            "speed": outcome.speed,
            "checks": [asdict(check) for check in outcome.checks],
            "proven": all(check.passed for check in outcome.checks),
            "trained": bool(history["transfer"] or history["fold"])
            or (bool(history["select"]) and config.select.train_weights),
            "selection": {
                "method": "given" if config.layers is not None else config.select.method,
                "window_forwards": selection.window_forwards,
                "rounds": selection.rounds,
                "gates": _gates(history["select"]),
            },
            "fold": history["fold"],
            "transfer": thinned(history["transfer"]),
            "similarity": outcome.similarity,
            "tokens": {
                "calibration": outcome.tokens.numel(),
                "windows": len(outcome.tokens),
                "seq_len": outcome.tokens.shape[1],
                "evaluation": 0 if outcome.evaluation is None else outcome.evaluation.numel(),
                "trained_on": outcome.tokens.numel() * config.transfer.passes,
                "replaced": config.transfer.replaced,  # of those of stage 2
            },
            "seconds": outcome.seconds,
            "run": outcome.run,
            "config": config.to_dict(),
            "versions": versions(),
        }
    )


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    import transformers

    from trsp_fast import __version__

    return {
        "trsp_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


def thinned(history: list[dict[str, Any]], most: int = POINTS) -> list[dict[str, Any]]:
    """At most so many evenly spaced steps, first and last among them."""
    if len(history) <= most:
        return history
    return [history[round(i * (len(history) - 1) / (most - 1))] for i in range(most)]


def _gates(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every layer's gate by step of stage 1, counted over the rounds; methods without gates have none."""
    steps = [{"step": step, "gates": entry["gates"]} for step, entry in enumerate(history) if "gates" in entry]
    return thinned(steps)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
