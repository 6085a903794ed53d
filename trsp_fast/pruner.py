"""prune(): select -> transfer -> remove -> verify -> save."""

import copy
import importlib.util
import json
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig, checked_layers
from trsp_fast.data import check_vocabulary
from trsp_fast.engine.distributed import Group, started
from trsp_fast.engine.optimizers import require_optimizer
from trsp_fast.engine.precision import SourceWeights, cast_parameters, run_dtype
from trsp_fast.engine.session import Session
from trsp_fast.engine.sharding import Shards, divided
from trsp_fast.errors import CheckFailed, UserError
from trsp_fast.models.checkpoint import check_finite, checkpoint_bytes, resolve_device, save_checkpoint
from trsp_fast.models.families import check_set, layer_stack
from trsp_fast.models.gates import bypassed
from trsp_fast.models.gathering import own_rows, round_rows
from trsp_fast.models.offload import HOST, streamed_layers
from trsp_fast.models.removal import kept_tensors, remove_layers
from trsp_fast.models.sharded_export import verify_divided, write_divided
from trsp_fast.models.verify import Check, require, verify_checkpoint, verify_removal
from trsp_fast.report.card import write_card
from trsp_fast.report.html import write_report
from trsp_fast.report.perplexity import perplexity
from trsp_fast.report.record import Outcome, report_of, versions
from trsp_fast.report.speed import measure_speed
from trsp_fast.run.events import Events, JsonLines, TensorBoard
from trsp_fast.run.identity import fingerprint, first_difference, require_same, tokens_digest
from trsp_fast.run.output import RUN, STATE, holds_state, resumable_output, write_durably, write_json
from trsp_fast.run.state import Keeper, Stop
from trsp_fast.select import Selection, choose_layers
from trsp_fast.select.shortgpt import block_influence
from trsp_fast.transfer import FOLDED, require_room, transfer

SIMILARITY_WINDOWS = 16  # calibration windows on which each layer's input and output are compared, for the report


@dataclass
class PruneResult:
    """What a run gives back.

    removed_layers: ascending.
    model: the pruned model, in the dtypes of the model that came in.
    history: `select` and `transfer`, one entry per step (see trsp_fast.select.trsp and trsp_fast.transfer), and `fold`,
        one per folded layer: layer, the projection's name in it, how far the states were `before` and `after`.
    perplexity: on the evaluation tokens: `dense`, `cut` (the chosen layers bypassed before stage 2), `transferred`
        (after stage 2, all layers on, no gates) and `pruned` (the result, reloaded from disk if it was written).
    checks: what was proved about the export.
    report: every number of report.json.
    """

    removed_layers: list[int]
    model: PreTrainedModel
    history: dict[str, list[dict[str, Any]]]
    perplexity: dict[str, float]
    checks: list[Check]
    report: dict[str, Any] = field(repr=False)
    out: Path | None = None


def prune(
    model: PreTrainedModel,
    tokens: Tensor,
    config: TRSPConfig,
    *,
    out: str | Path | None = None,
    evaluation: Tensor | None = None,
    tokenizer: Any = None,
    about: dict[str, Any] | None = None,
    events: Events | None = None,
    resume: bool = False,
    restart: bool = False,
    accept_changes: bool = False,
    stop: Stop | None = None,
    group: Group | None = None,
) -> PruneResult:
    """Take layers out of a model and keep what they knew.

    With `out`, the state of the run is saved beside it while it goes (`run.save_every`). A run that was killed,
    interrupted or ran out of space goes on with `resume` from there, on the same machine to the same bits.

    Where torchrun has started several processes, each calls this with the same model, tokens and configuration and they
    share the work (`run.parallel`). The first one alone proves, writes and has `events`. With `fsdp` the weights are
    divided among them, before and afterwards: no process has the result in one piece, `out` does.

    Args:
        model: a transformers causal language model. It is consumed: stage 2 trains its weights in place and the result
            shares them.
        tokens: calibration windows, int64 `[samples, seq]`.
        config: how much to remove, and how.
        out: folder for the checkpoint; it must be new or empty, and appears only when everything was proved.
        evaluation: windows to measure perplexity on, int64 `[windows, seq]`.
        tokenizer: saved along with the checkpoint.
        about: what the report says about the run (model, data, command).
        events: listeners of the run's progress.
        resume: go on with an interrupted run of `out`, given the same model, tokens and configuration.
        restart: discard an interrupted run of `out`.
        accept_changes: resume although data, configuration or versions differ.
        stop: says when the run should save its state and end.
        group: the processes that share the work, where they have been `started` already.

    Raises:
        UserError: a request that cannot be fulfilled.
        CheckFailed: losses were not finite, the quality bound was exceeded or the export is not proven.
        Interrupted: `stop` asked for the end and the state is kept.
        Lost: another process is gone; the state is kept.
    """
    with nullcontext(group) if group else started(config) as given, ExitStack() as during:
        processes = divided(given, model, config)
        during.enter_context(processes.watching())
        heard = (events or Events()) if processes.rank == 0 else Events()
        run = _Run(model, tokens, config, evaluation, heard, about or {}, processes)
        if out is None or processes.rank:
            run.keep(None, stop)
            result = run.execute(None, tokenizer)
        else:
            with resumable_output(out, resume=resume, restart=restart) as stage:
                result = _write(run, stage, tokenizer, stop, accept_changes)
        processes.agree(None)  # nobody is done before the output has its name
        run.session.keeper.discard()
    result.out = None if out is None else Path(out)
    return result


def _write(run: "_Run", stage: Path, tokenizer: Any, stop: Stop | None, accept_changes: bool) -> PruneResult:
    """A run whose states, events, checkpoint and report go into the folder `stage`."""
    (stage / RUN).mkdir(exist_ok=True)
    _check_identity(stage, run.identity(), accept_changes, run.events)
    held = holds_state(stage)
    run.keep(stage / STATE, stop)
    if held and not run.session.keeper.resumes:
        run.events.note("no saved state of the interrupted run is whole, so that it begins anew.")
    logs: list[JsonLines | TensorBoard] = [JsonLines(stage / RUN / "events.jsonl")]
    if importlib.util.find_spec("tensorboard"):
        logs.append(TensorBoard(stage / RUN / "tensorboard"))
    run.events.listeners += logs
    try:
        result = run.execute(stage, tokenizer)
    finally:
        run.events.emit("end")
        for log in logs:
            run.events.listeners.remove(log)
            log.close()
    write_json(stage / "report.json", result.report)
    write_report(result.report, stage / "report.html")
    write_card(result.report, stage / "README.md")
    return result


def _check_identity(stage: Path, identity: dict[str, Any], accept_changes: bool, events: Events) -> None:
    """Write down which run this is, or make sure that it is the interrupted one."""
    path = stage / RUN / "run.json"
    if holds_state(stage):
        before, now = _interrupted_identity(path), copy.deepcopy(identity)
        then = before.setdefault("processes", 1)
        if then != now["processes"]:
            events.note(
                f"the interrupted run had {then} processes, this one has {now['processes']}, which changes results by "
                "rounding only."
            )
            for values in (before, now):  # torchrun sets the threads by the number of processes
                values.pop("processes", None)
                values["versions"].pop("threads", None)
        if before["model"] != now["model"]:
            raise UserError(
                "the interrupted run had another model, whose weights its state may hold; give the same (folder, "
                "revision and config.json), or --restart to begin anew."
            )
        if not accept_changes:
            require_same(before, now)
        elif found := first_difference(before, now):
            events.note(f"the interrupted run had {found}; what was done before stays.")
    write_durably(path, (json.dumps(identity, indent=1) + "\n").encode())


def _interrupted_identity(path: Path) -> dict[str, Any]:
    try:
        before = json.loads(path.read_text())
        if isinstance(before["model"], str) and isinstance(before["versions"], dict):
            return before
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"the interrupted run's {path.name} is damaged, so that nobody knows what it was; give --restart to begin anew."
    )


class _Run:
    """One run in progress; `_execute` reads like the paper."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        config: TRSPConfig,
        evaluation: Tensor | None,
        events: Events,
        about: dict[str, Any],
        group: Group,
    ) -> None:
        self.config, self.events, self.about, self.group = config, events, about, group
        self.session = Session(events, group=group)
        self.tokens, self.evaluation = tokens, evaluation
        self.layers_before = len(layer_stack(model))
        config.layer_count(self.layers_before)
        if config.layers:
            check_set(model.config.to_dict(), list(config.layers))
        _check_tokens(tokens, model)
        check_finite(model)
        bound = config.quality.max_perplexity_ratio
        if bound and evaluation is None:
            raise UserError(f"quality.max_perplexity_ratio is {bound} but there is nothing to evaluate on; give data.")
        own = next(model.parameters()).device
        if config.transfer.passes:
            require_optimizer(config.transfer.optimizer)
        self.streams = config.run.offload == "weights"
        device = group.device or (
            own if config.device == "auto" and not self.streams else resolve_device(config.device)
        )
        dtype = run_dtype(config, device)
        if dtype == torch.float16:
            self.events.note("dtype float16 is used for computing only: weights are trained in float32.")
        self.fingerprint = fingerprint(model)
        self.dtype, self.device = dtype, device
        self.source = self._place(model)
        self.model = model
        if self.streams and config.transfer.happens:  # said now, as far as it is known before stage 1
            require_room(self.model, [], config.transfer, device)
        self.perplexity: dict[str, float] = {}
        self.similarity: dict[str, list[float]] = {}
        self.seconds: dict[str, float] = {}
        if group.agree(self._inputs()) != self._inputs():
            raise UserError(
                "the model, the tokens or the configuration differ from those of process 0; give all the same."
            )

    def _place(self, model: PreTrainedModel) -> SourceWeights:
        """Put the model where it is computed and in which dtype; divided, where the weights are."""
        model.eval()
        if isinstance(self.group, Shards):
            dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            trained = self.config.transfer.happens or self.config.select.train_weights
            self.group.divide(model, self.dtype, trained=trained)
            return SourceWeights(model, self.dtype, dtypes)
        source = SourceWeights(model, self.dtype)
        model.to(HOST if self.streams else self.device)
        cast_parameters(model, self.dtype)
        return source

    def _inputs(self) -> list[Any]:
        return [self.fingerprint, tokens_digest(self.tokens), json.dumps(self.config.to_dict())]

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the interrupted one."""
        config = self.config.to_dict()
        del config["run"]["save_every"], config["run"]["parallel"]  # decide how it is done, not what comes out
        return {
            "config": config,
            "model": self.fingerprint,
            "tokens": tokens_digest(self.tokens),
            "evaluation": tokens_digest(self.evaluation),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "processes": self.group.size,
            "versions": versions(),
        }

    def keep(self, folder: Path | None, stop: Stop | None) -> None:
        """Save states in `folder`, which the first process has, and go on from what is found in it."""
        store = self.group.store(folder)
        keeper = Keeper(store, self.config.run.save_every, stop, share=self.group.share, highest=self.group.highest)
        self.session.keeper = keeper
        facts, identity = keeper.facts, {**self.identity(), "processes": None, "versions": None}
        known = self.group.agree(json.dumps(identity))
        if facts.setdefault("known of", known) != known:  # --accept-changes: plans and perplexities were another run's
            facts.update({"known of": known, "perplexity": {}, "decided": {}})
        self.perplexity = facts.setdefault("perplexity", {})
        if keeper.base:
            self._measure("dense", self.model, self.group)  # here, since stage 1 has trained what comes now
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in keeper.base:
                    own_rows(parameter).copy_(keeper.base[name])

    def execute(self, stage: Path | None, tokenizer: Any) -> PruneResult:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(before or self.config.run.deterministic)
        try:
            return self._execute(stage, tokenizer)
        finally:
            torch.use_deterministic_algorithms(before)

    def _execute(self, stage: Path | None, tokenizer: Any) -> PruneResult:
        torch.manual_seed(self.config.seed)
        self._measure("dense", self.model, self.group)
        selection = self._timed("select", self._select)
        removed = sorted(selection.layers)
        self.events.emit("selected", layers=removed)
        with bypassed(self.model, removed):
            self._measure("cut", self.model, self.group)
        self._compare_layers("before")
        transferred = self._timed("transfer", lambda: self._transfer(removed))
        if transferred or self._folded:
            self._measure("transferred", self.model, self.group)
            self._compare_layers("after")
        if isinstance(self.group, Shards):
            small = self.group.without(self.model, removed)
            return self._finish_divided(selection, transferred, small, stage, tokenizer)
        small = remove_layers(self.model, removed)
        history = {"select": selection.history, "fold": self._folded, "transfer": transferred}
        report = self.group.first(lambda: self._prove(selection, history, small, stage, tokenizer))
        if self.group.rank:
            self.source.restore(small)
        checks = [Check(**check) for check in report["checks"]]
        return PruneResult(removed, small, history, self.perplexity, checks, report)

    def _finish_divided(
        self,
        selection: Selection,
        transferred: list[dict[str, Any]],
        small: PreTrainedModel,
        stage: Path | None,
        tokenizer: Any,
    ) -> PruneResult:
        """What `_prove` does where no process has the model: all prove together, the first one writes and reads."""
        removed = sorted(selection.layers)
        checks = verify_removal(self.model, small, removed)
        require(checks)
        dtypes = self._dtypes_of(small, removed)
        round_rows(small, dtypes)
        if self.group.agree(stage is not None):
            write_divided(small, stage, dtypes, self.group.whole, tokenizer)
            on_disk = verify_divided(small, stage, dtypes, self.group.whole)
            checks += [Check(**check) for check in self.group.agree([asdict(check) for check in on_disk])]
            require(checks)
        self.events.emit("checks", checks=[asdict(check) for check in checks])
        self._measure("pruned", small, self.group)
        self._require_quality()
        history = {"select": selection.history, "fold": self._folded, "transfer": transferred}
        report = self.group.first(lambda: self._report(selection, history, checks, {}, small, stage))
        return PruneResult(removed, small, history, self.perplexity, checks, report)

    def _dtypes_of(self, small: PreTrainedModel, removed: list[int]) -> dict[str, torch.dtype]:
        """In which the weights of a divided result are written: those in which they came."""
        kept = [layer for layer in range(self.layers_before) if layer not in removed]
        dtypes = {name: self.source.dtype(p) for name, p in kept_tensors(self.model, kept, "parameters").items()}
        self.source.adopt({parameter: dtypes[name] for name, parameter in small.named_parameters()})
        return dtypes

    def _prove(
        self,
        selection: Selection,
        history: dict[str, list[dict[str, Any]]],
        small: PreTrainedModel,
        stage: Path | None,
        tokenizer: Any,
    ) -> dict[str, Any]:
        """Prove, measure and save the pruned model; the report."""
        removed = sorted(selection.layers)
        with self._placed(self.model), self._placed(small):
            checks = verify_removal(self.model, small, removed)
            require(checks)
            speed = self._timed("speed", lambda: measure_speed({"dense": self.model, "pruned": small}))
        self.source.restore(small)
        if stage is None:
            measured = copy.deepcopy(small)
        else:
            save_checkpoint(small, stage, tokenizer)
            on_disk, measured = verify_checkpoint(small, stage)
            checks += on_disk
            require(checks)
        self.events.emit("checks", checks=[asdict(check) for check in checks])
        measured = measured.to(HOST if self.streams else self.device)
        cast_parameters(measured, self.dtype)
        self._measure("pruned", measured)
        self._require_quality()
        return self._report(selection, history, checks, speed, small, stage)

    def _report(
        self,
        selection: Selection,
        history: dict[str, list[dict[str, Any]]],
        checks: list[Check],
        speed: dict[str, dict[str, float]],
        small: PreTrainedModel,
        stage: Path | None,
    ) -> dict[str, Any]:
        size = {
            "dense": sum(p.numel() * self.source.dtype(p).itemsize for p in self.model.parameters()),
            "pruned": sum(p.numel() * self.source.dtype(p).itemsize for p in small.parameters()),
            "checkpoint": checkpoint_bytes(stage) if stage else None,
        }
        run = {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "processes": self.group.size,
            "weights": "divided" if self.group.sharded else "whole",
        }
        models = {"dense": self.model, "pruned": small}
        outcome = Outcome(
            about=self.about,
            config=self.config,
            model=self.model,
            layers_before=self.layers_before,
            selection=selection,
            history=history,
            perplexity=self.perplexity,
            similarity=self.similarity,
            speed=speed,
            parameters={name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
            weight_bytes=size,
            checks=checks,
            tokens=self.tokens,
            evaluation=self.evaluation,
            seconds=self.seconds,
            run=run,
        )
        return report_of(outcome)

    def _select(self) -> Selection:
        if self.config.layers is not None:
            return Selection(checked_layers(self.config.layers, self.layers_before))
        keeper = self.session.keeper
        if "selection" in keeper.facts:
            return self._of_wanted_size(Selection(**keeper.facts["selection"]))
        selection = self._of_wanted_size(self._choose())
        if self.config.select.train_weights and keeper.store:
            keeper.base = {name: own_rows(p).cpu().clone() for name, p in self.model.named_parameters()}
        keeper.remember("selection", asdict(selection))
        return selection

    def _of_wanted_size(self, selection: Selection) -> Selection:
        """With --accept-changes the interrupted run may have chosen more layers than are to go, or fewer."""
        chosen, wanted = len(selection.layers), self.config.layer_count(self.layers_before)
        if chosen != wanted:
            raise UserError(
                f"the interrupted run has chosen {chosen} layers already, {wanted} are to go now; ask for {chosen}, or "
                "give --restart to begin anew."
            )
        return selection

    def _choose(self) -> Selection:
        """Methods with rounds, which are saved, run in all processes; the quick ones are left to the first one.

        Where the weights are divided, nobody can be left alone.
        """
        if self.config.select.method in ("trsp", "sleb") or self.group.sharded:
            return choose_layers(self.model, self.tokens, self.config, session=self.session)
        alone = self.events
        return Selection(**self.group.first(lambda: asdict(choose_layers(self.model, self.tokens, self.config, alone))))

    def _placed(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """The model ready to be used on the run's device: streamed there, or there already."""
        return streamed_layers(model, self.device) if self.streams else nullcontext()

    def _transfer(self, removed: list[int]) -> list[dict[str, Any]]:
        if self.streams and self.config.transfer.happens:
            require_room(self.model, removed, self.config.transfer, self.device)
            self.model.to(self.device)
            self.streams = False
        return transfer(self.model, self.tokens, removed, self.config, session=self.session)

    @property
    def _folded(self) -> list[dict[str, Any]]:
        return self.session.keeper.facts.get(FOLDED, [])

    def _measure(self, name: str, model: PreTrainedModel, group: Group | None = None) -> None:
        """Perplexity of a model that all processes of the group have; without one, of this process's own."""
        if self.evaluation is not None and name not in self.perplexity:
            with self._placed(model):
                self.perplexity[name] = perplexity(model, self.evaluation, group=group)
            self.events.emit("perplexity", of=name, value=self.perplexity[name])

    def _compare_layers(self, when: str) -> None:
        """Cosine of each layer's input and output, all layers on, for the report: the first process's, if it can alone.

        A window at a time, so that no run ends here for want of memory.
        """
        if self.group.rank == 0 or self.group.sharded:
            with self._placed(self.model):
                influence = block_influence(self.model, self.tokens[:SIMILARITY_WINDOWS], batch=1)
            self.similarity[when] = [1 - value for value in influence]

    def _require_quality(self) -> None:
        bound = self.config.quality.max_perplexity_ratio
        ratio = self.perplexity["pruned"] / self.perplexity["dense"] if bound else 0.0
        if bound and not ratio <= bound:
            raise CheckFailed(
                f"perplexity rose {ratio:.3f} times, quality.max_perplexity_ratio allows {bound}; nothing was written."
            )

    def _timed(self, name: str, work: Any) -> Any:
        began = time.perf_counter()
        self.events.emit("phase", name=name)
        value = work()
        self.seconds[name] = round(time.perf_counter() - began, 2)
        return value


def _check_tokens(tokens: Tensor, model: PreTrainedModel) -> None:
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise UserError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}; give whole numbers [samples, seq] with seq at least 2."
        )
    check_vocabulary(tokens, model.config.get_text_config(decoder=True).vocab_size)
