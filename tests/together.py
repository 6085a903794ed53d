"""Runs scenarios in several processes at once, as torchrun would start them; what they find goes into one file each."""

import contextlib
import multiprocessing
import os
import signal
from pathlib import Path
from unittest import mock

import torch

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["killing", "tiny", "trsp_fast.pruner", "transformers.models.llama.modeling_llama"])

# 10 windows in batches of 3: with two processes shares of 1 and 2, and the last batch's one row is the second one's
SETTINGS = {
    "default": {
        "num_layers": 2,
        "select": {"steps_per_round": 3},
        "transfer": {"epochs": 2, "lr": 5e-4, "gap_lr": 1.0, "hold": 0.5, "lambda2": 1.0},
    },
    # Adam and weights trained in stage 1, no distillation, norms that stay: gradients of all kinds
    "paper": {
        "preset": "paper",
        "num_layers": 2,
        "select": {"train_weights": True, "weights_lr": 1e-3, "steps_per_round": 3},
        "transfer": {"lr": 1e-3, "trainable": "neighbours"},
    },
    # Stage 2 begins with a fold: of windows 3 and 7, which judge, each process has one
    "fold": {"num_layers": 2, "select": {"method": "shortgpt"}, "transfer": {"epochs": 1}},
    "sleb": {"num_layers": 1, "select": {"method": "sleb"}, "transfer": {"epochs": 0}},
}

SHORT = {"num_layers": 1, "select": {"steps_per_round": 1}}


def settings(name: str, **changes) -> dict:
    return {**SETTINGS[name], "data": {"batch": 3}, **changes}


def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (10, 16), generator=torch.Generator().manual_seed(1))


def pruned(name: str, **options):
    """A whole run on a tiny model, by its public function."""
    from tiny import tiny_llama

    import trsp_fast as trsp
    from trsp_fast import pruner

    changes = options.pop("changes", {})
    config = trsp.TRSPConfig.from_dict(settings(name, **changes))
    # Speed and proofs are no part of what is compared, and take longest.
    rates = {"prompt_tokens_per_second": 1.0, "generated_tokens_per_second": 1.0, "parameters": 1}
    speed, proof = (lambda models: dict.fromkeys(models, rates)), (lambda *_arguments: [])
    with mock.patch.multiple(pruner, measure_speed=speed, verify_removal=proof):
        return trsp.prune(tiny_llama(), tokens(), config, evaluation=tokens()[:2], **options)


def held(model, optimizer=None, teacher=None) -> int:
    """Bytes of weights, gradients and states of the optimiser in this process; what is shared counts once."""
    weights = [*model.parameters(), *(teacher.parameters() if teacher else [])]
    tensors = [*weights, *(p.grad for p in weights if p.grad is not None)]
    if optimizer:
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def weighed(name: str, **options) -> tuple[dict, dict]:
    """A run and what it held after the first step of each stage."""
    from trsp_fast import transfer
    from trsp_fast.select import gate_learning

    found: dict = {}
    first, second = gate_learning._learn_step, transfer._step

    def select_step(learning) -> None:
        first(learning)
        found.setdefault("select", held(learning.model, learning.optimizers.get("weights")))

    def transfer_step(run) -> None:
        second(run)
        trained = sum(p.numel() for p in run.weights.values())
        teacher = run.teacher.model if run.teacher else None
        found.setdefault("transfer", (held(run.model, run.optimizer, teacher), trained, len(run.weights)))

    gate_learning._learn_step, transfer._step = select_step, transfer_step
    try:
        with mock.patch(
            "trsp_fast.engine.session.HOST_STATES_SHARE", 1 << 60
        ):  # a second model, as docs/scaling.md counts
            return outcome(pruned(name, **options)), found
    finally:
        gate_learning._learn_step, transfer._step = first, second


def outcome(result, weights: dict | None = None) -> dict:
    """What of a run must not depend on the number of processes; `weights` where the result's own are divided."""
    return {
        "layers": result.removed_layers,
        "rounds": result.report["selection"]["rounds"],
        "history": result.history,
        "weights": weights or {name: p.detach().clone() for name, p in result.model.named_parameters()},
        "perplexity": result.report["perplexity"],
    }


def start(size: int, scenario, folder: Path, *arguments) -> list:
    """Start `scenario(*arguments)` in `size` processes; their results come by `finish`."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(size):
        process = context.Process(target=_work, args=(rank, size, scenario, folder, arguments))
        process.start()
        processes.append(process)
    return processes


def finish(processes: list, folder: Path) -> tuple[list[int], list]:
    """Exit codes and results by rank; None where a process has left none."""
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, f"a process hangs: {codes}"
    paths = [folder / f"{rank}.pt" for rank in range(len(processes))]
    return codes, [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def together(size: int, scenario, folder: Path, *arguments) -> tuple[list[int], list]:
    return finish(start(size, scenario, folder, *arguments), folder)


def _work(rank: int, size: int, scenario, folder: Path, arguments: tuple) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    torch.save(scenario(*arguments), folder / f"{rank}.pt")


def everything() -> dict:
    """All quick scenarios, one after the other: starting processes is what takes time."""
    from trsp_fast.config import TRSPConfig
    from trsp_fast.engine.distributed import started

    found: dict = {}
    with started(TRSPConfig()) as group:
        found["exchanges"] = exchanges(group)
    runs = {name: weighed(name) for name in SETTINGS}
    found["runs"] = {name: run for name, (run, _) in runs.items()}
    found["held"] = {name: held for name, (_, held) in runs.items()}
    for name, scenario in (("failure", failure), ("inputs", inputs), ("stop", stop), ("memory", memory)):
        found[name] = scenario()
    return found


def exchanges(group) -> dict:
    """Every method of the group, on values that differ by process."""
    from trsp_fast.engine import distributed

    own = float(group.rank + 1)
    found: dict = {"parts": {}}
    for total in range(1, 8):
        rows = torch.arange(total)
        found["parts"][total] = [(part.tolist(), weight) for part, weight in group.parts(rows, 2)]
    spread = group.spread(torch.full((len(range(5)[group._place(5)]), 2), own), 5)
    tensors = [torch.full((3, 2), own), torch.full((), own), torch.full((4,), own, dtype=torch.float64)]
    tensors += [torch.full((2, 3), own).t(), spread, torch.full((2,), group.rank + 1)]
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    parameters[0].grad = torch.full((2,), own)
    if group.rank == 1:
        parameters[1].grad = torch.ones(2)
    before, distributed.BUCKET = distributed.BUCKET, 40  # several buckets, and one tensor that has its own
    group.sum_with_gradients(tensors, parameters)
    distributed.BUCKET = before
    found["sums"] = tensors
    found["gradients"] = [parameter.grad for parameter in parameters]
    found["agreed"] = group.agree([group.rank, {3: 0.1}, float("inf"), "text", None])
    found["first"] = group.first(lambda: group.rank)
    found["highest"] = group.highest(group.rank, -group.rank, 7)
    state = ({"by layer": {1: 2.5}}, {"x": torch.tensor(3.5), "y": torch.ones(2, 3).bfloat16(), "z": torch.ones(0)})
    found["shared"] = group.share(state if group.rank == 0 else None)
    found["nothing"] = group.share(None)
    return found


def failure() -> list[str]:
    """The first process fails at the end of a run, the second in the middle of one: what each of them raises."""
    from trsp_fast import pruner
    from trsp_fast.errors import CheckFailed

    found = []
    try:
        pruned("default", changes={**SHORT, "transfer": {"epochs": 0}, "quality": {"max_perplexity_ratio": 1e-6}})
    except CheckFailed as error:
        found.append(str(error))
    original = pruner.transfer

    def fail(*arguments, **options):
        if os.environ["RANK"] == "1":
            raise ZeroDivisionError("a defect")
        return original(*arguments, **options)

    pruner.transfer = fail
    try:
        pruned("default", changes=SHORT)
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    pruner.transfer = original
    return found


def inputs() -> str:
    """The second process has another seed."""
    from trsp_fast.errors import UserError

    try:
        pruned("default", changes={"seed": int(os.environ["RANK"])})
    except UserError as error:
        return str(error)
    return ""


def stop() -> dict:
    """The second process is asked to end in the middle of stage 2."""
    from trsp_fast import transfer
    from trsp_fast.run.events import Events
    from trsp_fast.run.state import Stop

    wish, steps, original = Stop(), [], transfer._step

    def counted(run) -> None:
        steps.append(run.done)
        if run.done == 2 and os.environ["RANK"] == "1":
            wish.code = 143
        original(run)

    transfer._step = counted
    code = 0
    try:
        pruned("default", changes=SHORT, stop=wish, events=Events())
    except SystemExit as end:
        code = int(end.code or 0)
    transfer._step = original
    return {"code": code, "steps": steps}


def memory() -> dict:
    """The second process runs out of memory with two windows in one pass."""
    from trsp_fast.engine import session

    notes: list[str] = []
    original = session.Session.accumulate

    def scarce(self, rows, work, begin):
        def limited(part, weight):
            if len(part) > 1 and os.environ["RANK"] == "1":
                raise RuntimeError("can't allocate memory")
            work(part, weight)

        original(self, rows, limited, begin)
        notes.append(str(self.micro_batch))

    session.Session.accumulate = scarce
    result = outcome(pruned("default"))
    session.Session.accumulate = original
    return {"run": result, "micro_batches": notes}


def run_into(out: Path, name: str, changes: dict, kill: tuple[int, int] | None = None) -> dict:
    """A run with an output; `kill` is the process that dies and its step of stage 2."""
    from trsp_fast import transfer

    original = transfer._step

    def deadly(run) -> None:
        if kill == (int(os.environ["RANK"]), run.done):
            os.kill(os.getpid(), signal.SIGKILL)
        original(run)

    transfer._step = deadly
    error = None
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, transfer, "_step", original)
        try:
            return {"outcome": outcome(pruned(name, changes=changes, out=out, resume=True)), "error": None}
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
    return {"outcome": None, "error": error}
