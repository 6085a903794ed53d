"""compare(): every arm on the same tokens, one after the other, on one model that is put back in between."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast import laco
from trsp_fast.compare.arms import Arm
from trsp_fast.config import TRSPConfig
from trsp_fast.errors import CheckFailed, UserError
from trsp_fast.models.bypass import is_bypassed
from trsp_fast.models.families import layer_stack
from trsp_fast.models.gates import bypassed
from trsp_fast.models.removal import remove_layers
from trsp_fast.report.perplexity import perplexity
from trsp_fast.run.events import Events
from trsp_fast.select import Selection, choose_layers
from trsp_fast.select.shortgpt import block_influence
from trsp_fast.transfer import transfer

SIMILARITY_WINDOWS = 16  # windows on which the layers' cosine similarity is measured

# (model) -> score by task
Tasks = Callable[[PreTrainedModel], dict[str, float]]


@dataclass
class Comparison:
    """What is known so far: plain values throughout, so that an interrupted comparison goes on from its file.

    rows: one per arm, seed and number of removed layers (0 where nothing is removed): arm, seed, removed, layers
        (ascending), perplexity (in domain), perplexity_other (out of domain, null without such data), tokens (trained
        on), seconds, of which seconds_select and seconds_transfer, window_forwards of the choice, tasks.
    choices: selections by seed, number of layers and `select` settings; equal ones are made once.
    problems: arm, seed, removed and reason of what cannot be done or has no finite result.
    evidence: by arm, of the first seed: `gates` of each round and `similarity` of every layer's input and output
        before and after training, both with all layers on.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    evidence: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)

    def has(self, arm: str, seed: int, removed: int) -> bool:
        found = ((entry["arm"], entry["seed"], entry["removed"]) for entry in (*self.rows, *self.problems))
        return (arm, seed, removed) in found


@dataclass
class Comparer:
    """One model, its data and the configuration that all arms share.

    Args:
        model: a transformers causal language model; it comes back with its weights untouched.
        windows: the calibration windows of a seed, int64 `[samples, seq]`.
        evaluation: windows of the same domain, int64 `[windows, seq]`.
        other: windows of another domain.
        tasks: scores a pruned model; asked for each row.
        tasks_about: what was asked of `tasks`, so that an interrupted comparison goes on with the same.
        done: called after each row, with everything so far.
    """

    model: PreTrainedModel
    windows: Callable[[int], Tensor]
    evaluation: Tensor
    config: TRSPConfig
    other: Tensor | None = None
    tasks: Tasks | None = None
    tasks_about: dict[str, Any] | None = None
    events: Events = field(default_factory=Events)
    done: Callable[[Comparison], None] = lambda comparison: None

    def __post_init__(self) -> None:
        if self.config.select.train_weights:
            raise UserError(
                "select.train_weights is true; several arms share a choice of layers here, set it to false."
            )
        self._weights = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}

    def run(
        self, arms: Sequence[Arm], counts: Sequence[int], seeds: Sequence[int], found: Comparison | None = None
    ) -> Comparison:
        """Every arm for every number of layers to remove and every seed; what `found` has already is not repeated."""
        found = found or Comparison()
        wanted = [
            (arm, count, seed)
            for seed in seeds
            for count in counts
            for arm in arms
            if not _redundant(arm, count, counts) and not found.has(arm.name, seed, removed_by(arm, count))
        ]
        began = time.perf_counter()
        for index, (arm, count, seed) in enumerate(wanted):
            left = (time.perf_counter() - began) / index * (len(wanted) - index) if index else None
            removed = removed_by(arm, count)
            self.events.emit(
                "arm", arm=arm.name, seed=seed, removed=removed, index=index, arms=len(wanted), seconds_left=left
            )
            try:
                found.rows.append(self._row(arm, count, seed, found, seed == seeds[0]))
                self.events.emit("arm_done", **found.rows[-1])
            except (UserError, CheckFailed) as error:  # the other arms go on
                problem = {"arm": arm.name, "seed": seed, "removed": removed, "reason": str(error).rstrip(".")}
                found.problems.append(problem)
                self.events.note(f"{arm.name} with {removed} layers less, seed {seed}: {error}")
            finally:
                self._restore()
            self.done(found)
        return found

    def _row(self, arm: Arm, count: int, seed: int, found: Comparison, first: bool) -> dict[str, Any]:
        config, tokens = self._config(arm, count, seed), self.windows(seed)
        row: dict[str, Any] = {"arm": arm.name, "seed": seed, "removed": removed_by(arm, count)}
        row |= {"tokens": 0, "window_forwards": 0}
        if arm.merges:
            began = time.perf_counter()
            small, collapse = laco.merge(self.model, count, tokens, at_once=laco_span(len(layer_stack(self.model))))
            row["layers"] = sorted(layer for group in collapse.groups for layer in group[1:])
            row |= {"seconds_select": time.perf_counter() - began, "window_forwards": collapse.window_forwards}
            return self._judged(row | {"seconds_transfer": 0.0}, small)
        selection, seconds = self._selection(arm, count, config, tokens, found)
        row |= {"seconds_select": seconds, "window_forwards": selection.window_forwards}
        row["layers"] = layers = sorted(selection.layers)
        before = block_influence(self.model, tokens[:SIMILARITY_WINDOWS]) if first else []
        began = time.perf_counter()
        if arm.transfer is not None:
            torch.manual_seed(seed)
            steps = transfer(self.model, tokens, layers, config)
            row["tokens"] = tokens.numel() * config.transfer.passes if steps else 0
        row["seconds_transfer"] = time.perf_counter() - began
        if first:
            found.evidence[f"{arm.name} {count}"] = self._evidence(
                selection, before, tokens, arm.transfer is not None and config.transfer.happens
            )
        with bypassed(self.model, layers):
            return self._judged(row, self.model)

    def _evidence(self, selection: Selection, before: list[float], tokens: Tensor, trained: bool) -> dict[str, Any]:
        after = block_influence(self.model, tokens[:SIMILARITY_WINDOWS]) if trained else before
        return {
            "gates": [step["gates"] for step in selection.history if "gates" in step],
            "similarity": {name: [1 - x for x in values] for name, values in (("before", before), ("after", after))},
        }

    def _judged(self, row: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
        row["perplexity"] = perplexity(model, self.evaluation)
        row["perplexity_other"] = None if self.other is None else perplexity(model, self.other)
        if not all(math.isfinite(row[name] or 0.0) for name in ("perplexity", "perplexity_other")):
            raise CheckFailed("its perplexity is not finite")
        if self.tasks is not None:
            # A KV cache, which generating tasks use, does not bear every bypass.
            gone = [index for index, layer in enumerate(layer_stack(model).layers) if is_bypassed(layer)]
            row["tasks"] = self.tasks(remove_layers(model, gone) if gone else model)
        row["seconds"] = row["seconds_select"] + row["seconds_transfer"]
        return row

    def _selection(
        self, arm: Arm, count: int, config: TRSPConfig, tokens: Tensor, found: Comparison
    ) -> tuple[Selection, float]:
        if arm.select is None:
            return Selection([]), 0.0
        key = f"seed {config.seed}, {count} layers, {asdict(config.select)}"
        if key not in found.choices:
            torch.manual_seed(config.seed)
            began = time.perf_counter()
            selection = choose_layers(self.model, tokens, config, self.events)
            found.choices[key] = {"selection": asdict(selection), "seconds": time.perf_counter() - began}
            self._restore()  # select.train_weights
        return Selection(**found.choices[key]["selection"]), found.choices[key]["seconds"]

    def _config(self, arm: Arm, count: int, seed: int) -> TRSPConfig:
        config = arm.config(self.config, seed).to_dict()
        config |= {"ratio": None, "layers": None, "num_layers": count}
        return TRSPConfig.from_dict(config)

    @torch.no_grad()
    def _restore(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self._weights[name])


def removed_by(arm: Arm, count: int) -> int:
    """How many layers an arm takes out where `count` are to go."""
    return 0 if arm.select is None and not arm.merges else count


def laco_span(layers: int) -> int:
    """How many layers LaCo merges at once: the paper's 4 of 32, in proportion, since 4 of 12 ruin a model."""
    return max(2, round(4 * layers / 32))


def _redundant(arm: Arm, count: int, counts: Sequence[int]) -> bool:
    """Arms that remove nothing are the same for every number of layers."""
    return removed_by(arm, count) == 0 and count != counts[0]


def layer_counts(model: PreTrainedModel, ratios: Sequence[float], numbers: Sequence[int]) -> list[int]:
    """How many layers to remove, ascending and each once, from shares of the layers and from numbers.

    Raises:
        UserError: a share or number that removes none or all of them.
    """
    if not ratios and not numbers:
        raise UserError("nothing says how much to remove; give --ratio or --num-layers.")
    total = len(layer_stack(model))
    configs = [TRSPConfig(ratio=ratio) for ratio in ratios] + [TRSPConfig(num_layers=number) for number in numbers]
    return sorted({config.layer_count(total) for config in configs})
