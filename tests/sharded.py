"""Scenarios of divided weights (FSDP2), run in several processes by `together`."""

import together
import torch


def whole(model, group) -> dict:
    """Every weight of a divided model in one piece."""
    return {name: group.whole(parameter).clone() for name, parameter in model.named_parameters()}


def transferred(settings: dict, layers=(1, 3)) -> dict:
    """Stage 2 by itself, divided where there are several processes."""
    import torch.distributed as dist
    from tiny import tiny_llama

    from trsp_fast.config import TRSPConfig
    from trsp_fast.engine.distributed import started
    from trsp_fast.engine.session import Session
    from trsp_fast.engine.sharding import divided
    from trsp_fast.transfer import transfer

    parallel = "fsdp" if dist.is_initialized() else "auto"
    config = TRSPConfig.from_dict({"num_layers": 2, "run": {"parallel": parallel}, "data": {"batch": 3}, **settings})
    with started(config) as processes:
        model = tiny_llama()
        group = divided(processes, model, config)
        if group.sharded:
            group.divide(model, torch.float32, trained=True)
        history = transfer(model, together.tokens(), layers, config, session=Session(group=group))
        return {"history": history, "weights": whole(model, group)}


def runs(names, out=None) -> dict:
    """Whole runs, with everything that is proved; weights in one piece."""
    import torch.distributed as dist
    from tiny import tiny_llama

    import trsp_fast as trsp
    from trsp_fast.engine.distributed import started
    from trsp_fast.engine.sharding import divided

    found = {}
    for name in names:
        changes = {"run": {"parallel": "fsdp"}} if dist.is_initialized() else {}
        config = trsp.TRSPConfig.from_dict(together.settings(name, **changes))
        tokens, into = together.tokens(), out and out / name
        with started(config) as processes:
            model = tiny_llama()
            group = divided(processes, model, config)
            result = trsp.prune(model, tokens, config, evaluation=tokens[:3], out=into, group=group)
            found[name] = {**together.outcome(result, whole(result.model, group)), "report": result.report}
    return found
