"""Stage 2 of TRSP (arXiv 2505.18232, section 3.3): move the knowledge of the chosen layers into those that stay."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trsp_fast.config import TransferConfig, TRSPConfig
from trsp_fast.data import with_noise
from trsp_fast.engine.memory import MemoryPlan, plan_memory, unprobed
from trsp_fast.engine.objective import INFERENCE_BATCH, WindowOrder
from trsp_fast.engine.optimizers import (
    STATE_BYTES,
    Named,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_rate,
    step_if,
)
from trsp_fast.engine.precision import Masters, fp32_weights
from trsp_fast.engine.readback import Figures, Readback
from trsp_fast.engine.session import Session
from trsp_fast.engine.streak import Streak
from trsp_fast.engine.teacher import InputTap, StoredStates, Teacher, UntouchedModel, hidden_distance
from trsp_fast.errors import UserError
from trsp_fast.fold import fold, fold_points, projections
from trsp_fast.models.compiled import compiled_layers
from trsp_fast.models.families import layer_stack
from trsp_fast.models.free_memory import free_memory
from trsp_fast.models.gates import LayerGates
from trsp_fast.models.gathering import own_rows
from trsp_fast.models.recompute import recomputed
from trsp_fast.ridge import VALIDATION
from trsp_fast.run.events import Events
from trsp_fast.run.state import State, fitting

_SCALARS = ("loss", "lm_loss", "penalty", "hidden")
FOLDED = "folded"  # the fact under which a run keeps what was folded
BATCH = 4  # windows a step by default: many small steps, since few tokens are spent


@dataclass
class _Training:
    """What one call of `transfer` carries from step to step; `done` steps of `steps` are finished."""

    model: PreTrainedModel
    teacher: Teacher | None
    tap: InputTap  # of the model, at the layers that the teacher has states of
    settings: TransferConfig
    session: Session
    gates: LayerGates
    tokens: Tensor
    order: WindowOrder
    steps: int
    masters: Masters
    weights: Named
    optimizer: torch.optim.Optimizer
    objective: Callable[[Tensor, Any], tuple[Tensor, Tensor]] = field(init=False)
    done: int = 0
    readback: Readback = field(default_factory=Readback)
    streak: Streak = field(default_factory=lambda: Streak("2", "transfer.lr"))
    history: list[dict[str, Any]] = field(default_factory=list)


def transfer(
    model: PreTrainedModel,
    tokens: Tensor,
    layers: Sequence[int],
    config: TRSPConfig,
    events: Events | None = None,
    *,
    session: Session | None = None,
) -> list[dict[str, Any]]:
    """Train the model's weights in place so that `layers` can go: loss + lambda2 * sum of D over `layers`.

    Starts with every layer on. Weights of a lower precision than fp32 are trained as fp32 copies under autocast and
    come back in their dtype. Dropout stays off: the tokens are few and the aim is the model itself. A step whose loss
    or gradient is not finite is not applied. Everything, figures too, is of the windows with `transfer.noise` in them.

    Args:
        tokens: calibration windows, int64 `[samples, seq]`.
        layers: the layers chosen in stage 1.
        events: listeners, where there is no `session`.
        session: what a run carries from stage to stage; see trsp_fast.engine.session.

    Returns:
        One entry per step: step, loss, lm_loss, penalty (lambda2 * sum of D), hidden (weighted too), D by layer (null
        while bypassed), gate, lambda2, lr, gradient_norm.

    Raises:
        Diverged: loss or gradient was not finite in three steps in a row.
        Interrupted: the run was asked to end; its state is saved.
    """
    settings, session = config.transfer, session or Session(events or Events())
    order = WindowOrder(len(tokens), config.data.batch or BATCH, config.seed)
    steps = settings.passes * order.steps_per_pass
    state = session.keeper.found("transfer") if steps else None
    if state is None:  # else its weights are folded already
        session.keeper.facts.pop(FOLDED, None)
    if not settings.happens:
        return []
    tokens = with_noise(tokens, settings.replaced, config.seed)
    training = model.training
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    weights = trained_weights(model, layers, settings)
    if not steps:  # a fold changes nothing else
        weights = _projections_of(model, tokens, weights)
    teacher = _teacher(model, tokens, layers, weights, settings, session) if settings.imitates else None
    for parameter in weights.values():
        parameter.requires_grad_(True)
    history: list[dict[str, Any]] = []
    try:
        with (
            fp32_weights(model, weights.values()) as masters,
            ExitStack() as during,  # ends after the gates, whose bypasses lie over it
            _gates(model, layers, settings) as gates,
        ):
            if state is None and settings.folds:
                assert teacher is not None
                _fold(model, teacher, tokens, gates, weights, masters, session)
            if isinstance(teacher, StoredStates):  # what was there for the fold alone
                teacher.inputs = {point: teacher.inputs[point] for point in _points(model, layers, settings)}
            if steps:
                factors = rate_factors(model, weights, layers, settings.gap_lr)
                weights = session.group.own(weights)
                optimizer = make_optimizer(settings.optimizer, weights, settings.lr, (0.9, 0.95), factors)
                tap = during.enter_context(InputTap(model, _points(model, layers, settings)))
                run = _Training(
                    model, teacher, tap, settings, session, gates, tokens, order, steps, masters, weights, optimizer
                )
                with session.keeper.steps():
                    _train(run, state, config, during)
                history = run.history
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.train(training)
    return history


def _train(run: _Training, state: State | None, config: TRSPConfig, during: ExitStack) -> None:
    """The steps that are still to do. `during` lasts until the gates, whose bypasses lie over it, have ended."""
    session = run.session
    run.objective = _choose_objective(run, config.run.deterministic)
    plan = session.plan("transfer", run.order.batch * run.tokens.shape[1], lambda: _plan(run))
    if config.run.compile:
        during.enter_context(compiled_layers(run.model))
    during.enter_context(recomputed(run.model, plan.recomputed))
    if state is not None:
        _resume(run, state)
    while run.done < run.steps:
        _step(run)
        run.done += 1
        last = run.done == run.steps
        session.keeper.after_step(lambda: _state(run), last=last, size=_state_bytes(run))
    run.readback.flush()


def _fold(
    model: PreTrainedModel,
    teacher: Teacher,
    tokens: Tensor,
    gates: LayerGates,
    weights: Named,
    masters: Masters,
    session: Session,
) -> None:
    """Begin with the fold; with divided weights nobody has the whole projection."""
    if session.group.sharded:
        session.events.note("transfer.fold is left out: the weights are divided among processes.")
        return
    if len(tokens) < VALIDATION:
        session.events.note(
            f"transfer.fold is left out: every {VALIDATION}th window judges it, and there are {len(tokens)}; set "
            f"data.samples to {VALIDATION} or more."
        )
        return
    gates.bypass(gates.layers)
    with gates.neutral():
        found = fold(
            model,
            teacher,
            tokens,
            gates.layers,
            weights.values(),
            autocast=masters.autocast,
            group=session.group,
        )
    gates.restore(gates.layers)  # the first step decides anew
    if gates.layers and not found:
        session.events.note("the fold changed nothing: no projection brings the states of other windows nearer.")
    stack = layer_stack(model).layers
    entries = [
        {"layer": layer, "projection": _name_in(stack[layer], one.projection), "before": one.before, "after": one.after}
        for layer, one in found.items()
    ]
    session.keeper.facts[FOLDED] = entries  # a resumed run, which does not fold again, has it from there
    session.events.emit("folded", layers=entries)


def _name_in(layer: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in layer.named_modules() if module is wanted)


def trainable_weights(model: PreTrainedModel, layers: Sequence[int], which: str) -> Named:
    """The parameters that stage 2 trains, by name: `all`, or `neighbours`.

    Neighbours are the layers that stay next to a removed one, on both sides, and every normalisation: they see what
    the removed layer no longer does.
    """
    named = dict(model.named_parameters())
    if which == "all":
        return named
    stack = layer_stack(model)
    kept = [layer for layer in range(len(stack)) if layer not in layers]
    beside = {max((k for k in kept if k < layer), default=None) for layer in layers}
    beside |= {min((k for k in kept if k > layer), default=None) for layer in layers}
    modules = [stack.layers[layer] for layer in beside if layer is not None]
    modules += [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    wanted = {parameter for module in modules for parameter in module.parameters()}
    return {name: parameter for name, parameter in named.items() if parameter in wanted}


def trained_weights(model: PreTrainedModel, layers: Sequence[int], settings: TransferConfig) -> Named:
    """Of the trainable ones those that get gradients: no layer's that is out of the function from the start."""
    named = trainable_weights(model, layers, settings.trainable)
    if settings.gate != "anneal" or settings.hold < 1 or settings.lambda2 > 0:
        return named
    stack = layer_stack(model)
    gone = {p for layer in layers for p in stack.layers[layer].parameters()}
    gone -= {p for layer in range(len(stack)) if layer not in layers for p in stack.layers[layer].parameters()}
    return {name: parameter for name, parameter in named.items() if parameter not in gone}


def rate_factors(model: PreTrainedModel, weights: Named, layers: Sequence[int], gap_lr: float) -> dict[str, float]:
    """By name of a weight its learning rate in units of `transfer.lr`.

    `gap_lr` in the layers next to one that goes, 1 two away, 1 / `gap_lr` from three away on; 1 in those that go, while
    they are there, and in what is in no layer. A weight of several layers that stay is that of the nearest.
    """
    distance: dict[nn.Parameter, int] = {}
    for index, layer in enumerate(layer_stack(model).layers):
        nearest = min((abs(index - gone) for gone in layers), default=0)
        for parameter in layer.parameters() if nearest else ():
            distance[parameter] = min(nearest, distance.get(parameter, nearest))
    powers = {0: 0, 1: 1, 2: 0}
    return {name: gap_lr ** powers.get(distance.get(parameter, 0), -1) for name, parameter in weights.items()}


def _projections_of(model: PreTrainedModel, tokens: Tensor, weights: Named) -> Named:
    """Of the weights those that a fold changes."""
    device = next(model.parameters()).device
    found = {p for module in projections(model, tokens[:1].to(device)).values() for p in module.parameters()}
    return {name: parameter for name, parameter in weights.items() if parameter in found}


def _possible_projections(model: PreTrainedModel, weights: list[nn.Parameter]) -> list[nn.Parameter]:
    """The same as far as shapes tell: of each layer the largest map to hidden states, and its bias."""
    size, allowed, found = model.config.get_text_config(decoder=True).hidden_size, set(weights), []
    for layer in layer_stack(model).layers:
        maps = [m for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D)) and size in m.weight.shape]
        largest = max(maps, key=lambda m: m.weight.numel(), default=None)
        found += [] if largest is None else [p for p in largest.parameters() if p in allowed]
    return found


def bytes_held(model: PreTrainedModel, layers: Sequence[int], settings: TransferConfig) -> int:
    """What stage 2 holds on the device, in bytes: weights in fp32, teacher, gradients, optimiser; no activations."""
    trained = list(trained_weights(model, layers, settings).values())
    if not settings.passes:
        trained = _possible_projections(model, trained)
    held = sum(parameter.nbytes for parameter in model.parameters())
    held += sum(parameter.nbytes for parameter in trained) if settings.imitates else 0
    step = 4 + STATE_BYTES[settings.optimizer] if settings.passes else 0
    return held + round(sum((4 - p.itemsize + step) * p.numel() for p in trained))


def require_room(model: PreTrainedModel, layers: Sequence[int], settings: TransferConfig, device: torch.device) -> None:
    """Where the weights are still in host memory: refuse stage 2 on a device that cannot hold what it takes.

    Raises:
        UserError: it does not fit, activations apart.
    """
    needed, free = bytes_held(model, layers, settings), free_memory(device)
    there = sum(p.nbytes for p in model.parameters() if p.device == device)
    less = "transfer.epochs=0 or transfer.trainable=neighbours" if settings.passes else "transfer.fold=none"
    if needed - there > free:
        raise UserError(
            f"stage 2 trains the weights on {device} and holds {needed / 1e9:.2f} GB there, {(free + there) / 1e9:.2f} "
            f"GB are free; give {less}, or use a device with more memory."
        )


def _points(model: PreTrainedModel, layers: Sequence[int], settings: TransferConfig) -> list[int]:
    """Where hidden states are imitated: what each layer that stays is given, and what the last one hands on.

    Layer 0 is given embeddings in both, so that nothing is to be learned there.
    """
    if not settings.hidden:
        return []
    total = len(layer_stack(model))
    return [layer for layer in range(1, total) if layer not in layers] + [total]


def _teacher(
    model: PreTrainedModel,
    tokens: Tensor,
    layers: Sequence[int],
    trained: Named,
    settings: TransferConfig,
    session: Session,
) -> Teacher:
    """The untouched model: its states of all windows, or copies of the weights that will be trained, others shared."""
    fitted = fold_points(model, layers) if settings.folds else []
    points, group = sorted({*_points(model, layers, settings), *fitted}), session.group

    def copied() -> Teacher:
        held = sum(parameter.nbytes for parameter in trained.values())
        untouched = group.untouched(model, trained)  # a fold runs it as it goes
        return UntouchedModel(untouched, _points(model, layers, settings), held, whole=group.sharded)

    if group.sharded:  # every process would store the states of windows that others will draw
        return copied()
    coming = bytes_held(model, layers, settings) - sum(p.nbytes for p in (*model.parameters(), *trained.values()))
    return session.teacher(model, tokens, points, INFERENCE_BATCH, copied, coming=coming)


def _gates(model: PreTrainedModel, layers: Sequence[int], settings: TransferConfig) -> LayerGates:
    mode = "residual" if settings.gate == "anneal" else None
    gates = LayerGates(model, mode=mode, layers=layers, detach_norms=settings.detach_input)
    gates.values.requires_grad_(False)
    return gates


def _plan(run: _Training) -> MemoryPlan:
    if run.session.group.sharded:
        return unprobed(run.model)
    trained = sum(parameter.numel() for parameter in run.weights.values())

    def step(windows: int) -> None:
        scalars, _ = _losses(run, torch.arange(windows), run.settings.lambda2)
        scalars["loss"].backward()

    return plan_memory(
        run.model,
        step,
        min(run.order.batch, len(run.tokens)),
        run.tokens.shape[1],
        gated=run.gates.layers,
        held={"fp32 copies": run.masters.growth, "untouched model": run.teacher.held if run.teacher else 0},
        coming={"optimiser": round(STATE_BYTES[run.settings.optimizer] * trained)},
        gradients=4 * trained,
    )


def _resume(run: _Training, state: State) -> None:
    """Weights, optimiser and history as the saved state has them."""
    run.done, run.history = state.step, state.values["history"]
    run.streak.count, run.session.micro_batch = state.values["streak"], state.values["micro_batch"]
    optimizer = {n.removeprefix("optimizer."): t for n, t in state.tensors.items() if n.startswith("optimizer.")}
    if optimizer:
        load_optimizer_state(run.optimizer, run.weights, optimizer)
    elif run.done < run.steps:
        run.session.events.note(
            f"stage 2 had ended after {run.done} steps and its optimiser was not kept: the further ones begin with new "
            "moments."
        )
    with torch.no_grad():
        for name, parameter in run.weights.items():
            parameter.copy_(fitting(state.tensors, f"weight.{name}", parameter))
    run.session.events.emit("resumed", stage="transfer", step=run.done)


def _state(run: _Training) -> State:
    run.readback.flush()
    values = {"history": run.history, "streak": run.streak.count, "micro_batch": run.session.micro_batch}
    tensors: dict[str, Tensor] = {f"weight.{name}": parameter for name, parameter in run.weights.items()}
    found = optimizer_state(run.optimizer, run.weights) if run.done < run.steps else {}
    return State("transfer", run.done, values, tensors | {f"optimizer.{name}": value for name, value in found.items()})


def _state_bytes(run: _Training) -> int:
    """Of the trained weights, and before the last step of the optimiser's state."""
    own = [own_rows(parameter) for parameter in run.weights.values()]
    moments = STATE_BYTES[run.settings.optimizer] if run.done < run.steps else 0.0
    return round(sum(rows.nbytes + moments * rows.numel() for rows in own))


def _step(run: _Training) -> None:
    """One optimiser step; its entry of the history follows when its figures have arrived."""
    settings, gates, device = run.settings, run.gates, run.gates.values.device
    step, gate, weight = run.done, gate_at(run.settings, run.done, run.steps), lambda2_at(settings, run.done, run.steps)
    gates.values.fill_(gate)
    if gate == 0 and (settings.lambda2 == 0 or settings.detach_input):
        gates.bypass(gates.layers)  # out of the function, and of the loss or with a D of their own: do not compute
        gates.with_norms = settings.lambda2 > 0
    rows = run.order.rows(step)
    sums: Figures = {}

    def begin() -> None:
        run.optimizer.zero_grad()
        sums.update({name: torch.zeros((), device=device) for name in _SCALARS})
        # one value in all processes, also in one without rows; NaN says that layers have no D
        sums["D"] = torch.full_like(gates.values, 0.0 if gates.with_norms else math.nan)

    def work(part: Tensor, share: float) -> None:
        scalars, distances = _losses(run, part, weight)
        (scalars["loss"] * share).backward()
        for name, value in scalars.items():
            sums[name] += value.detach() * share
        for layer, d in distances.items():
            sums["D"][layer] += d.detach() * share

    run.session.accumulate(rows, work, begin)
    run.session.group.sum_with_gradients([*sums.values()], run.weights.values())
    norm = run.session.group.clip(run.weights.values(), settings.clip or math.inf)
    finite = torch.isfinite(sums["loss"]) & torch.isfinite(norm)
    rate = settings.lr * learning_rate_factor(settings.warmup, step, run.steps)
    set_rate(run.optimizer, rate)
    entry = {"gate": gate if settings.gate == "anneal" else 1.0, "lambda2": weight, "lr": rate}
    figures = {**sums, "norm": norm, "finite": finite}
    run.readback.put(figures, lambda host: _note(run, step, rows, entry, host))
    step_if(run.optimizer, finite)


def _losses(run: _Training, rows: Tensor, weight: float) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Of some windows: `_SCALARS`, and D by layer.

    loss is what is minimised: the objective, plus the weighted penalty, plus the weighted distance of hidden states.
    """
    tokens = run.tokens[rows].to(run.gates.values.device)
    with run.masters.autocast:
        targets = run.teacher.targets(rows, tokens) if run.teacher is not None else None
        objective, lm_loss = run.objective(tokens, targets)
    distances = run.gates.distances(run.settings.norm)
    nothing = objective.new_zeros(())
    penalty = weight * torch.stack(list(distances.values())).sum() if distances else nothing
    hidden = nothing
    if targets is not None and run.settings.hidden:
        hidden = hidden_at(run.settings, run.done, run.steps) * hidden_distance(run.tap.taken, targets.inputs)
    return {"loss": objective + penalty + hidden, "lm_loss": lm_loss, "penalty": penalty, "hidden": hidden}, distances


def _choose_objective(run: _Training, reproducible: bool) -> Callable[[Tensor, Any], tuple[Tensor, Tensor]]:
    """What is minimised, and the language model loss, of windows of tokens and the teacher's `Targets`."""
    window = run.tokens[:1].to(run.gates.values.device)
    with run.masters.autocast:
        if run.settings.objective == "distill":
            assert run.teacher is not None
            distillation = run.session.distillation(run.model, run.teacher, window)
            return distillation
        loss = run.session.loss(run.model, window, reproducible=reproducible)
    return lambda tokens, _targets: (loss(tokens),) * 2


def _note(run: _Training, step: int, rows: Tensor, settings: dict[str, float], host: Figures) -> None:
    """One step's entry of the history, as plain values, once they have arrived."""
    distances = {layer: float(host["D"][layer]) for layer in run.gates.layers}
    entry = {
        "step": step,
        "steps": run.steps,
        "loss": float(host["loss"]),
        "lm_loss": float(host["lm_loss"]),
        "penalty": float(host["penalty"]),
        "hidden": float(host["hidden"]),
        "D": {layer: None if math.isnan(d) else d for layer, d in distances.items()},
        **settings,
        "gradient_norm": float(host["norm"]),
    }
    run.history.append(entry)
    run.session.events.emit("transfer_step", **entry)
    what = f"loss is {entry['loss']} with gradient norm {entry['gradient_norm']}"
    run.streak.take(bool(host["finite"]), what, f"step {step}", rows)


def gate_at(settings: TransferConfig, step: int, steps: int) -> float:
    """The gate of the chosen layers: 1 at the first step, linearly to 0 after 1 - hold of the steps, then 0.

    It is 0 at the last step also where `hold` is 0, so that the cut changes nothing.
    """
    if settings.gate == "none":
        return 1.0
    falling = min((1 - settings.hold) * steps, steps - 1)
    return max(0.0, 1 - step / falling) if falling else 0.0


def lambda2_at(settings: TransferConfig, step: int, steps: int) -> float:
    """The penalty's weight: constant, or growing linearly to lambda2 at the last step."""
    return settings.lambda2 * ((step + 1) / steps if settings.lambda_schedule == "grow" else 1.0)


def hidden_at(settings: TransferConfig, step: int, steps: int) -> float:
    """The weight of hidden states: constant, or falling linearly to `hidden` / steps at the last step."""
    return settings.hidden * (1 - step / steps if settings.hidden_schedule == "fall" else 1.0)


def learning_rate_factor(warmup: float, step: int, steps: int) -> float:
    """Linear warm-up over `warmup` of the steps, then linear decay to 1/steps of the way before 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(1, steps - rising)
