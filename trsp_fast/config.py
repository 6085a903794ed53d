"""TRSPConfig: the only place where the names, defaults and allowed ranges of a run live."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trsp_fast.errors import UserError


def _setting(default: Any, *, choices: tuple = (), low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with its allowed values: one of `choices`, or a number in [low, high]."""
    return field(default=default, metadata={"choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class SelectConfig:
    """Stage 1: how the layers to remove are chosen (arXiv 2505.18232, section 3.2; the rest is ours).

    method: `trsp` learns one gate per layer; the others are rivals, see trsp_fast.select.
    schedule: `iterative` chooses one layer per round, `oneshot` all of them after one round.
    gate_mode: `output` scales a layer's whole output (the paper), `residual` blends output and input.
    optimizer: `adam`, `sgd`, or `natural` (the gradient divided by the gates' own second moment over sequences).
    steps_per_round: optimiser steps in each round; 0 is one pass over the calibration data (the paper).
    rank: `magnitude` removes the smallest gate (the paper), `fisher` the gate whose loss curves least.
    shortlist: bypass the so many lowest-ranked layers one at a time and take the one that hurts least, those out of
        reach no further than they need (trsp_fast.select.race); 0 is the paper.
    judge: a candidate of the shortlist is bypassed (`cut`), or folded into the layer below it besides (`fold`), for
        what stage 2 mends at its start should not decide (trsp_fast.select.stand_in).
    exchange: after the last round each chosen layer but the last, unless its race was clear and nothing has changed
        since, is raced once more, with the others gone, against those that were close to being chosen
        (trsp_fast.select.exchange); with `schedule=iterative` and a shortlist.
    train_weights: the model's weights learn together with the gates (the authors' code).
    samples: the choice is made on the first so many calibration windows; 0 is all of them.
    """

    method: str = _setting(
        "trsp", choices=("trsp", "shortgpt", "sleb", "angular", "shortened", "last", "first", "random")
    )
    schedule: str = _setting("iterative", choices=("iterative", "oneshot"))
    gate_mode: str = _setting("residual", choices=("residual", "output"))
    lambda1: float = _setting(5e-4, low=0)
    optimizer: str = _setting("natural", choices=("adam", "sgd", "natural"))
    lr: float = _setting(0.1, low=0)
    steps_per_round: int = _setting(1, low=0)
    reset_gates: bool = _setting(True)
    rank: str = _setting("fisher", choices=("magnitude", "fisher"))
    shortlist: int = _setting(16, low=0)
    judge: str = _setting("fold", choices=("cut", "fold"))
    exchange: bool = _setting(True)
    protect_first: int = _setting(0, low=0)
    protect_last: int = _setting(0, low=0)
    train_weights: bool = _setting(False)
    weights_lr: float = _setting(2e-5, low=0)
    samples: int = _setting(0, low=0)


@dataclass(frozen=True)
class TransferConfig:
    """Stage 2: how the knowledge of the chosen layers moves out (arXiv 2505.18232, section 3.3; the rest is ours).

    norm: the distance D between a chosen layer's input and output. Per sequence of n kept elements: `l2` is
        sqrt(sum d^2 / n), `l1` is sum |d| / n, `frobenius` is sqrt(sum d^2) (the authors' code).
    lambda_schedule: lambda2 `constant`, or `grow` linearly from 0 to lambda2.
    detach_input: D moves the chosen layer only, not the layers before it.
    objective: `lm`, or `distill` (KL divergence to the logits of the untouched model).
    hidden: weight of the distance to the untouched model's hidden states where layers stay, relative to their size.
    hidden_schedule: hidden `constant`, or `fall` linearly to 0 after the last step: logits have the last word.
    noise: where only the untouched model is imitated, this share of the tokens is replaced by others of the calibration
        text (trsp_fast.data.with_noise), for both models: the shorter one also learns what the untouched one makes of
        text unlike the calibration's.
    fold: where the layers are out from the first step, `start` first folds what they did into projections of those
        that stay, in closed form (trsp_fast.fold); `alone` leaves it at that, without training; or `none`.
    gate: `anneal` takes residual gates of the chosen layers from 1 to 0 over the first 1 - `hold` of the steps; with
        the default hold of 1 they are 0 from the first step, and the layers cost nothing.
    epochs: passes over the calibration data; 0 skips stage 2, unless `fold` is `alone`.
    lr: peak learning rate; the default won on models of 0.3 and 2.7 M parameters, billions want far less.
    gap_lr: the learning rate of layers next to one that goes, in units of `lr`: they have most to learn. Two away it is
        `lr`, from three away on `lr` / gap_lr; with 1 it is the same everywhere (trsp_fast.transfer.rate_factors).
    optimizer: `adamw`, or `adamw8bit` (torchao's, moments in 8 bits: a quarter of the optimiser's memory).
    trainable: which weights learn: `all`, or `neighbours`: the layers beside each removed one and every normalisation.
    """

    norm: str = _setting("l2", choices=("l1", "l2", "frobenius"))
    lambda2: float = _setting(0.0, low=0)
    lambda_schedule: str = _setting("constant", choices=("constant", "grow"))
    detach_input: bool = _setting(True)
    objective: str = _setting("distill", choices=("lm", "distill"))
    hidden: float = _setting(20.0, low=0)
    hidden_schedule: str = _setting("fall", choices=("constant", "fall"))
    noise: float = _setting(0.1, low=0, high=1)
    fold: str = _setting("start", choices=("none", "start", "alone"))
    gate: str = _setting("anneal", choices=("none", "anneal"))
    hold: float = _setting(1.0, low=0, high=1)
    epochs: int = _setting(3, low=0)
    lr: float = _setting(5e-4, low=0)
    gap_lr: float = _setting(2.0, low=1)
    warmup: float = _setting(0.05, low=0, high=1)
    clip: float = _setting(1.0, low=0)
    optimizer: str = _setting("adamw", choices=("adamw", "adamw8bit"))
    trainable: str = _setting("all", choices=("all", "neighbours"))

    @property
    def passes(self) -> int:
        """Passes over the calibration data with optimiser steps."""
        return 0 if self.fold == "alone" else self.epochs

    @property
    def happens(self) -> bool:
        """Whether there is a stage 2 at all."""
        return self.epochs > 0 or self.fold == "alone"

    @property
    def folds(self) -> bool:
        """Whether stage 2 begins with a fold: its layers must be out of the function from the first step."""
        return self.happens and self.fold != "none" and self.gate == "anneal" and self.hold == 1

    @property
    def replaced(self) -> float:
        """The share of tokens that is replaced: where the text itself is learned, none."""
        return self.noise if self.objective == "distill" or not self.passes else 0.0

    @property
    def imitates(self) -> bool:
        """Whether the untouched model, or its states, must be there."""
        return self.objective == "distill" or self.hidden > 0 or self.folds


@dataclass(frozen=True)
class DataConfig:
    """Calibration: `samples` windows of `seq_len` tokens (0: min(2048, context)), `batch` windows a step (0: auto)."""

    samples: int = _setting(128, low=1)
    seq_len: int = _setting(0, low=0)
    batch: int = _setting(0, low=0)


@dataclass(frozen=True)
class RunConfig:
    """How a run executes.

    save_every: save the state after so many steps; 0: as often as takes a twentieth of the time, and at the end of a
        round or stage where that takes less time than its steps did.
    parallel: `ddp` shares every batch among torchrun's processes, each with a whole model; `fsdp` also divides the
        weights among them; `auto`, where torchrun has started several, is `ddp` if a GPU holds a whole model in both
        stages, else `fsdp`; `none` leaves every process on its own.
    deterministic: same bits on the same machine, at some cost on a GPU.
    compile: decoder layers through torch.compile; the first steps take long, the others less.
    offload: `weights` leaves the layers' weights in host memory and streams them to the device, one layer ahead,
        everywhere but in stage 2, which trains them and needs them there.
    """

    save_every: int = _setting(0, low=0)
    parallel: str = _setting("auto", choices=("none", "auto", "ddp", "fsdp"))
    deterministic: bool = _setting(False)
    compile: bool = _setting(False)
    offload: str = _setting("none", choices=("none", "weights"))


@dataclass(frozen=True)
class QualityConfig:
    """max_perplexity_ratio: refuse to write the checkpoint above this ratio of pruned to dense perplexity; 0: never."""

    max_perplexity_ratio: float = _setting(0.0, low=0)


@dataclass(frozen=True)
class TRSPConfig:
    """Everything that decides a run. Exactly one of `ratio`, `num_layers` and `layers` says how much is removed.

    Raises:
        UserError: a value of the wrong type or outside its range, naming field, value and what is allowed.
    """

    ratio: float | None = None
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    seed: int = _setting(0, low=0, high=2**63 - 1)
    dtype: str = _setting("auto", choices=("auto", "float32", "bfloat16", "float16"))
    device: str = _setting("auto")
    select: SelectConfig = field(default_factory=SelectConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        _check(self, "")
        given = [name for name in ("ratio", "num_layers", "layers") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} were both given; they exclude each other, give one of them.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UserError(
                f"ratio is {self.ratio}; it is the share of layers to remove, give a number between 0 and 1."
            )
        if self.transfer.fold == "alone" and not self.transfer.folds:
            raise UserError(
                f"transfer.fold is alone but the layers leave later (transfer.gate {self.transfer.gate}, transfer.hold "
                f"{self.transfer.hold}); give gate anneal and hold 1."
            )
        if self.run.offload == "weights" and self.select.train_weights:
            raise UserError(
                "run.offload is weights but select.train_weights is true; weights that are trained cannot stay in host "
                "memory, give select.train_weights=false or run.offload=none."
            )

    def layer_count(self, total: int) -> int:
        """How many of `total` layers this configuration removes.

        Raises:
            UserError: nothing was asked for, or it comes to none or all of the layers, or `layers` is out of range.
        """
        if self.layers is not None:
            return len(checked_layers(self.layers, total))
        if self.ratio is None and self.num_layers is None:
            raise UserError("nothing says how much to remove; give one of ratio, num_layers and layers.")
        if self.num_layers is not None:
            count, asked = self.num_layers, f"num_layers {self.num_layers}"
        else:
            assert self.ratio is not None
            count, asked = math.floor(self.ratio * total + 0.5), f"ratio {self.ratio}"
        if not 0 < count < total:
            amount = "none" if count <= 0 else "all or more"
            raise UserError(f"{asked} of {total} layers comes to {amount} of them; between 1 and {total - 1} can go.")
        return count

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `TRSPConfig.from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TRSPConfig":
        """Build from nested plain values on top of the preset that `values["preset"]` names (default: `default`)."""
        values = dict(values)
        preset = values.pop("preset", "default")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UserError(f"preset is {preset!r}; it must be one of {', '.join(PRESETS)}.")
        return _build(cls, _merge(PRESETS[preset], values), "")

    @classmethod
    def from_preset(cls, preset: str, **values: Any) -> "TRSPConfig":
        """A preset with nested changes: `from_preset("paper", ratio=0.25, transfer={"lambda2": 1e-2})`."""
        return cls.from_dict({"preset": preset, **values})

    @classmethod
    def from_file(cls, path: str | Path, changes: dict[str, Any] | None = None) -> "TRSPConfig":
        """Read YAML or JSON (by its content: JSON is YAML), then apply nested `changes`."""
        return cls.from_dict(_merge(read_file(path), changes or {}))


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # The paper's text: gates on the whole output, one pass per round, best lambdas on LLaMA2-7B; where it is silent
    # (learning rates, optimiser, frozen weights) the smallest reading that lets the gates move.
    "paper": {
        "select": {
            "gate_mode": "output",
            "optimizer": "adam",
            "lr": 1e-2,
            "lambda1": 5e-3,
            "steps_per_round": 0,
            "reset_gates": False,
            "rank": "magnitude",
            "shortlist": 0,
        },
        "transfer": {
            "norm": "l2",
            "lambda2": 1e-3,
            "lambda_schedule": "constant",
            "detach_input": False,
            "objective": "lm",
            "hidden": 0.0,
            "noise": 0.0,
            "fold": "none",
            "gate": "none",
            "epochs": 1,
            "lr": 2e-5,
            "gap_lr": 1.0,
            "warmup": 0.03,
        },
    },
    # The authors' code as far as it is defined: its labels (last token only) and its accumulation over 1,024 are not.
    "authors-code": {
        "select": {
            "gate_mode": "output",
            "optimizer": "adam",
            "lr": 2e-5,
            "lambda1": 100.0,
            "steps_per_round": 0,
            "reset_gates": False,
            "rank": "magnitude",
            "shortlist": 0,
            "protect_first": 3,
            "protect_last": 4,
            "train_weights": True,
            "weights_lr": 2e-5,
        },
        "transfer": {
            "norm": "frobenius",
            "lambda2": 1e-4,
            "lambda_schedule": "constant",
            "detach_input": False,
            "objective": "lm",
            "hidden": 0.0,
            "noise": 0.0,
            "fold": "none",
            "gate": "none",
            "epochs": 1,
            "lr": 2e-5,
            "gap_lr": 1.0,
            "warmup": 0.03,
        },
    },
    # The two stages of the paper with what won by themselves: gates annealed and the penalty, before the layers leave.
    "two-stage": {
        "select": {"judge": "cut"},
        "transfer": {"gate": "anneal", "hold": 0.8, "lambda2": 1.0, "noise": 0.0, "fold": "none", "gap_lr": 1.0},
    },
    # The plain rival: the layers leave first, all tokens are spent on distilling the logits.
    "cut-first": {
        "select": {"judge": "cut"},
        "transfer": {
            "gate": "anneal",
            "hold": 1.0,
            "lambda2": 0.0,
            "hidden": 0.0,
            "noise": 0.0,
            "fold": "none",
            "gap_lr": 1.0,
        },
    },
}


def checked_layers(layers: typing.Iterable[int], total: int) -> list[int]:
    """The layers in ascending order.

    Raises:
        UserError: one is repeated or out of range, or none or all of them are named.
    """
    layers = list(layers)
    for layer in layers:
        if not 0 <= layer < total:
            raise UserError(f"layer {layer} does not exist; this model has layers 0 to {total - 1}.")
        if layers.count(layer) > 1:
            raise UserError(f"layer {layer} is named {layers.count(layer)} times; name each layer once.")
    if not 0 < len(layers) < total:
        raise UserError(f"{len(layers)} of {total} layers were named; between 1 and {total - 1} can be removed.")
    return sorted(layers)


def read_file(path: str | Path) -> dict[str, Any]:
    """The nested values of a YAML or JSON configuration file.

    Raises:
        UserError: the file is missing, is not YAML, or does not hold a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(
            f"configuration {str(path)!r} cannot be read ({error.strerror}); give an existing file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"configuration {str(path)!r} is not YAML ({str(error).splitlines()[0]}); correct it."
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"configuration {str(path)!r} holds a {type(values).__name__}; it must hold `field: value` lines."
        )
    return values


def parse_setting(text: str) -> dict[str, Any]:
    """`transfer.norm=l1` as nested values; the right side is YAML, so 3, 1e-3, true and [1, 2] have their type."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"setting {text!r} has no value; write it as field=value, for example transfer.norm=l1.")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"setting {text!r} has a value that is not YAML; write field=value.") from None
    nested: Any = parsed
    for part in reversed(name.split(".")):
        nested = {part: nested}
    return nested


def merge(*parts: dict[str, Any]) -> dict[str, Any]:
    """Nested values, the later ones win."""
    result: dict[str, Any] = {}
    for part in parts:
        result = _merge(result, part)
    return result


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if nested else value
    return merged


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in known:
            where = f"{prefix}{name}"
            raise UserError(f"{where} is not a field of the configuration; known here are {', '.join(known)}.")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{name} is {value!r}; it is a group, give `field: value` lines below it.")
            value = _build(hints[name], value, f"{prefix}{name}.")
        arguments[name] = value
    instance = cls(**{name: _coerced(value, hints[name]) for name, value in arguments.items()})
    if prefix:
        _check(instance, prefix)
    return instance


def _coerced(value: Any, hint: Any) -> Any:
    """What YAML cannot say by itself: 1e-3 without a dot is text there, whole numbers may stand for floats."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in options and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if float in options and type(value) is int:
        return float(value)
    return value


def _check(instance: Any, prefix: str) -> None:
    """Types, choices and ranges of every field of one group."""
    hints = typing.get_type_hints(type(instance))
    for f in dataclasses.fields(instance):
        value, hint, name = getattr(instance, f.name), hints[f.name], f"{prefix}{f.name}"
        if dataclasses.is_dataclass(hint):
            _check(value, f"{name}.")
            continue
        if not _has_type(value, hint):
            raise UserError(f"{name} is {value!r}; it must be {_described(hint)}.")
        choices, low, high = (f.metadata.get(key) for key in ("choices", "low", "high"))
        if choices and value not in choices:
            raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")
        too_low, too_high = low is not None and value < low, high is not None and value > high
        if (isinstance(value, float) and not math.isfinite(value)) or too_low or too_high:
            bounds = "a finite number"
            if low is not None:
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise UserError(f"{name} is {value}; it must be {bounds}.")


def _has_type(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_has_type(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_has_type(item, int) for item in value)
    if hint is float:
        return isinstance(value, float | int) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    if isinstance(hint, types.UnionType):
        hint = typing.get_args(hint)[0]
    return names.get(hint, "a list of layer indices")
