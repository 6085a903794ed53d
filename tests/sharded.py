"""Scenarios of divided weights (FSDP2), run in several processes by `together`."""

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import together
import torch


@contextmanager
def divided_run(config, model):
    """The processes, with the weights of `model` to be divided where there are several."""
    from trsp_fast.engine.distributed import started
    from trsp_fast.engine.sharding import divided

    with started(config) as processes:
        yield divided(processes, model, config)


def whole(model, group) -> dict:
    """Every weight of a divided model in one piece."""
    return {name: group.whole(parameter).clone() for name, parameter in model.named_parameters()}


def run(name: str, out=None, changes=None, model=None, micro_batch: int = 0, **options) -> dict:
    """A whole run, with everything that is proved; weights in one piece. Divided candidates are cut, not folded."""
    from tiny import tiny_llama

    import trsp_fast as trsp
    from trsp_fast import pruner
    from trsp_fast.engine.session import Session

    fsdp = {"run": {"parallel": "fsdp"}} if os.environ.get("WORLD_SIZE", "1") != "1" else {}
    values = together.settings(name, **{**fsdp, **(changes or {})})
    config = trsp.TRSPConfig.from_dict(values | {"select": {"judge": "cut", **values.get("select", {})}})
    tokens, model = together.tokens(), model or tiny_llama()
    rates = {"prompt_tokens_per_second": 1.0, "generated_tokens_per_second": 1.0}
    at_once = lambda *arguments, **more: Session(*arguments, **more, micro_batch=micro_batch)  # noqa: E731
    with (
        mock.patch.multiple(pruner, measure_speed=lambda models: dict.fromkeys(models, rates), Session=at_once),
        divided_run(config, model) as group,
    ):
        result = trsp.prune(model, tokens, config, evaluation=tokens[:3], out=out, group=group, **options)
        found = together.outcome(result, whole(result.model, group))
    return {**found, "report": {**result.report, "seconds": None}}


def runs(names, out: Path, micro_batch: int = 0) -> dict:
    from safetensors import safe_open

    found = {}
    for name in names:
        found[name] = run(name, out / name, micro_batch=micro_batch)
        with safe_open(out / name / "model.safetensors", "pt") as file:
            found[name]["written"] = list(file.keys())
        found[name] |= {"files": os.listdir(out / name), "config": (out / name / "config.json").read_text()}
    return found


def everything(folder: Path) -> dict:
    """All quick scenarios, one after the other: starting processes is what takes time."""
    found: dict = {"runs": runs(["default", "paper"], folder)}
    for scenario in (held, parts, refused):
        found[scenario.__name__] = scenario()
    return found


def more(folder: Path) -> dict:
    return {
        "runs": runs(["sleb"], folder),
        "bf16": bf16(),
        "experts": experts(folder),
        "shortgpt": chosen("shortgpt"),
    }


def held() -> dict:
    """Of a step of stage 2: bytes of weights, gradients, moments and teacher afterwards, weights that are not in parts
    then, and bytes of the tensors that FSDP gathered and of the gradients that it added up in it.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives as fsdp

    from trsp_fast import transfer

    found: list = []
    moved = {"gathered": 0, "reduced": 0}
    original = transfer._step

    def counted(kind: str, key: str, own):
        def call(self, *arguments, **tensors):
            moved[kind] += tensors[key].nbytes
            return own(self, *arguments, **tensors)

        return call

    def step(state) -> None:
        before = dict(moved)
        original(state)
        weights = [*state.model.named_parameters(), *state.teacher.model.named_parameters()]
        local = [parameter.to_local() for _, parameter in weights if hasattr(parameter, "to_local")]
        moments = [t for s in state.optimizer.state.values() for key, t in s.items() if key != "step"]
        gradients = [parameter.grad for parameter in state.weights.values()]
        size = sum(tensor.nbytes for tensor in (*local, *moments, *gradients))
        odd = [name for name, parameter in weights if not hasattr(parameter, "to_local")]
        found.append({"bytes": size, "odd": odd, **{kind: moved[kind] - before[kind] for kind in moved}})

    gather, reduce = fsdp.DefaultAllGather, fsdp.DefaultReduceScatter
    with (
        mock.patch.object(transfer, "_step", step),
        mock.patch.object(gather, "__call__", counted("gathered", "output_tensor", gather.__call__)),
        mock.patch.object(reduce, "__call__", counted("reduced", "input_tensor", reduce.__call__)),
    ):
        run("default", changes={**together.SHORT, "data": {"batch": 2}})
    return found[0]


def parts() -> dict:
    from trsp_fast.config import TRSPConfig

    with divided_run(TRSPConfig.from_dict({"run": {"parallel": "fsdp"}}), torch.nn.Linear(1, 1)) as group:
        return {
            (total, size): [(rows.tolist(), weight) for rows, weight in group.parts(torch.arange(total), size)]
            for total in range(1, 8)
            for size in (0, 1, 2)
        }


def failure() -> str:
    """The second process fails in the middle of a forward pass of stage 2, and ends."""
    from trsp_fast import transfer

    original = transfer._losses

    def fail(state, *arguments):
        if os.environ["RANK"] == "1" and state.done == 1:
            raise ZeroDivisionError("a defect")
        return original(state, *arguments)

    with mock.patch.object(transfer, "_losses", fail):
        try:
            run("default", changes=together.SHORT)
        except ZeroDivisionError:
            sys.exit(3)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def scarce() -> str:
    """The second process runs out of memory in a pass: it cannot ask the others for smaller ones, and says so."""
    from trsp_fast import transfer
    from trsp_fast.errors import UserError

    def fail(*_arguments):
        raise RuntimeError("can't allocate memory")

    with mock.patch.object(transfer, "_losses", fail if os.environ["RANK"] == "1" else transfer._losses):
        try:
            run("default", changes=together.SHORT)
        except UserError as error:
            if os.environ["RANK"] == "1":
                sys.exit(2)
            return str(error)
    return ""


def bf16() -> dict:
    """A model in bf16 and a run in bf16; which dtype layers see."""
    from tiny import tiny_llama

    states = set()
    model = tiny_llama().to(torch.bfloat16)
    model.model.layers[0].register_forward_hook(lambda _module, args, output: states.add(output.dtype))
    result = run("default", changes={"dtype": "bfloat16", "transfer": {"epochs": 4}}, model=model)
    losses = [entry["loss"] for entry in result["history"]["transfer"]]
    # what was written has the source's values: bf16, also where rows are kept in fp32
    dtypes = {
        torch.bfloat16 if torch.equal(w, w.bfloat16().to(w.dtype)) else w.dtype for w in result["weights"].values()
    }
    return {"states": states, "dtypes": dtypes, "proven": result["report"]["proven"], "loss": [losses[0], min(losses)]}


def experts(folder: Path) -> dict:
    """A family whose layers are converted between its files and memory."""
    from zoo import build

    return run("default", folder / "experts", {**together.SHORT, "transfer": {"epochs": 1}}, build("mixtral"))


def refused() -> dict:
    from tiny import tiny_llama

    from trsp_fast.errors import UserError

    shared = tiny_llama()
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    found = {}
    for what, changes, model in (
        ("compile", {"run": {"parallel": "fsdp", "compile": True}}, None),
        ("adamw8bit", {"transfer": {"optimizer": "adamw8bit"}}, None),
        ("shared", {}, shared),
    ):
        try:
            run("default", changes=changes, model=model)
        except UserError as error:
            found[what] = str(error)
    return found


def chosen(method: str) -> list[int]:
    changes = {"num_layers": 2, "select": {"method": method}, "transfer": {"epochs": 0}}
    return run("sleb", changes=changes)["layers"]


def run_into(out: Path, name: str, changes: dict, kill: tuple[int, str, int] | None = None) -> dict:
    """A run with an output; `kill` is the process that dies, the stage and its step."""
    from trsp_fast import transfer
    from trsp_fast.select import gate_learning

    steps = {"transfer": (transfer, "_step"), "select": (gate_learning, "_learn_step")}
    place = steps[kill[1] if kill else "transfer"]
    original, done = getattr(*place), []

    def deadly(state) -> None:
        if kill and kill[0] == int(os.environ["RANK"]) and len(done) == kill[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(state.done)
        original(state)

    with mock.patch.object(*place, deadly):
        try:
            return {"outcome": run(name, out, changes, micro_batch=1, resume=True), "error": None}
        except Exception as error:
            return {"outcome": None, "error": f"{type(error).__name__}: {error}"}


def nodes(local: int, names, out: Path) -> dict:
    """Processes as if on nodes of `local` each."""
    from tiny import tiny_llama

    from trsp_fast.config import TRSPConfig

    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    model = tiny_llama()
    with divided_run(TRSPConfig.from_dict({"run": {"parallel": "fsdp"}}), model) as group:
        group.divide(model, torch.float32, trained=True)
        held = sum(parameter.to_local().nbytes for parameter in model.parameters())
        copies = group.copies
    return {"copies": copies, "held": held, "runs": runs(names, out)}
