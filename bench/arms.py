"""Arms of a comparison on the built-in model: everything that two bench scripts share."""

import copy
import json
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trsp_fast.config import TRSPConfig, merge
from trsp_fast.data import calibration_windows, demo_model, evaluation_windows, load_streams, window_length
from trsp_fast.models.checkpoint import load_model, load_tokenizer
from trsp_fast.models.gates import bypassed
from trsp_fast.report.perplexity import perplexity
from trsp_fast.select import choose_layers
from trsp_fast.transfer import transfer

RESULTS = Path(__file__).parent / "results"


class Subject:
    """A model with its calibration stream and evaluation windows."""

    def __init__(self, folder: str | Path, data: str, evaluation: int = 128) -> None:
        self.model = load_model(str(folder), dtype="float32", device="cpu")
        self.length = window_length(self.model.config, 0)
        self.streams = load_streams(data, load_tokenizer(str(folder)))
        self.evaluation = evaluation_windows(self.streams.evaluation, self.length, evaluation)

    @classmethod
    def demo(cls) -> "Subject":
        return cls(demo_model(), "demo")

    def calibration(self, samples: int, seed: int) -> Tensor:
        return calibration_windows(self.streams.calibration, samples, self.length, seed)

    def chosen(self, tokens: Tensor, count: int, seed: int, select: dict[str, Any]) -> tuple[list[int], int]:
        """Layers in order of choice, and the cost in window forwards."""
        config = TRSPConfig.from_dict({"num_layers": count, "seed": seed, "select": select})
        selection = choose_layers(self.model, tokens, config)
        return selection.layers, selection.window_forwards

    def cut_perplexity(self, layers: Iterable[int], model: nn.Module | None = None) -> float:
        model = model or self.model
        with bypassed(model, layers):
            return perplexity(model, self.evaluation)

    def transferred(self, tokens: Tensor, layers: list[int], seed: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Stage 2 on a copy: perplexity before and after the cut, D at both ends, seconds."""
        model = copy.deepcopy(self.model)
        config = TRSPConfig.from_dict(merge({"num_layers": len(layers) or 1, "seed": seed}, {"transfer": settings}))
        began = time.perf_counter()
        history = transfer(model, tokens, layers, config)
        seconds = time.perf_counter() - began
        uncut = perplexity(model, self.evaluation)
        return {
            "perplexity": self.cut_perplexity(layers, model) if layers else uncut,
            "perplexity_uncut": uncut,
            "tokens": tokens.numel() * config.transfer.passes,
            "D": [history[0]["D"], history[-1]["D"]] if history else [],
            "seconds": round(seconds, 1),
        }


def write_results(name: str, rows: list[dict[str, Any]], **about: Any) -> Path:
    """Rows and where they come from, to bench/results/NAME.json."""
    machine = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
    }
    path = RESULTS / f"{name}.json"
    values = {"date": time.strftime("%Y-%m-%d"), **machine, "torch": torch.__version__, **about, "rows": rows}
    path.write_text(json.dumps(values, indent=1) + "\n")
    return path
