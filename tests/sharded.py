"""Scenarios of divided weights (FSDP2), run in several processes by `together`."""

import together
import torch


def whole(model) -> dict:
    """Every weight of a divided model in one piece."""
    from trsp_fast.models import sharded

    return {name: sharded.whole(parameter).clone() for name, parameter in model.named_parameters()}


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
        return {"history": history, "weights": whole(model)}
