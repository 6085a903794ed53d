"""Block influence (ShortGPT, arXiv 2403.03853): remove the layers that turn their input least."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.objective import INFERENCE_BATCH
from trsp_fast.engine.session import Session
from trsp_fast.models.families import layer_stack
from trsp_fast.select.contract import Selection, candidates


@torch.no_grad()
def block_influence(model: PreTrainedModel, tokens: Tensor, batch: int = INFERENCE_BATCH) -> list[float]:
    """1 - mean over tokens of cos(x, out), for each layer (the paper's equation 1); tokens int64 `[samples, seq]`."""
    layers = layer_stack(model).layers
    sums, device = torch.zeros(len(layers), dtype=torch.float64), next(model.parameters()).device
    counts = torch.zeros(len(layers), dtype=torch.float64)  # several a token where there are streams (Gemma 3n)

    def hook(index: int):  # type: ignore[no-untyped-def]
        def add(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            out = output[0] if isinstance(output, tuple) else output
            cosines = F.cosine_similarity(x.float(), out.float(), dim=-1)
            sums[index] += cosines.double().sum().cpu()
            counts[index] += cosines.numel()

        return add

    handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
    model.eval()
    try:
        for part in tokens.split(batch):
            model(input_ids=part.to(device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return (1 - sums / counts).tolist()


def select(model: PreTrainedModel, tokens: Tensor, count: int, config: TRSPConfig, session: Session) -> Selection:
    """The `count` layers of smallest block influence, all from one measurement."""
    influence = block_influence(model, tokens)
    for layer, value in enumerate(influence):
        session.events.emit("candidate", layer=layer, block_influence=value)
    ranked = sorted(candidates(model, config), key=lambda layer: influence[layer])
    history = [{"layer": layer, "block_influence": value} for layer, value in enumerate(influence)]
    return Selection(ranked[:count], history, len(tokens))
