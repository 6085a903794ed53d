"""A report of the first version, and a reader that refuses pages that need a network or are not well nested."""

import html.parser

REPORT = {
    "model": "<script>alert(1)</script>",
    "data": "text.txt",
    "evaluation_data": "the rest",
    "command": "trsp-fast prune x --layers 1,3",
    "removed_layers": [1, 3],
    "order_of_choice": [3, 1],
    "layers_before": 5,
    "layers_after": 3,
    "parameters": {"dense": 1000, "pruned": 600},
    "weight_bytes": {"dense": 4000, "pruned": 2400, "checkpoint": 6500},
    "perplexity": {"dense": 10.0, "cut": 30.0, "transferred": 11.5, "pruned": 12.25},
    "speed": {
        "dense": {"prompt_tokens_per_second": 100.0, "generated_tokens_per_second": 10.0, "parameters": 1000},
        "pruned": {"prompt_tokens_per_second": 160.0, "generated_tokens_per_second": 15.0, "parameters": 600},
    },
    "checks": [{"name": "reload", "passed": True, "detail": "9 keys"}],
    "proven": True,
    "trained": True,
    "selection": {
        "method": "trsp",
        "window_forwards": 1234,
        "rounds": [{"round": 0, "layer": 3, "gate": 0.25, "curvature": 2e-4, "gates": [1.0, 0.5, 0.75, 0.25, None]}],
    },
    "fold": [{"layer": 2, "before": 0.25, "after": 0.125}],
    "transfer": [
        {"step": 0, "steps": 1, "loss": 2.5, "lm_loss": 2.0, "penalty": 0.5, "D": {"1": 3.5, "3": None},
         "gate": 1.0, "lambda2": 1.0, "lr": 1e-3, "gradient_norm": 1.0}
    ],
    "tokens": {"calibration": 512, "windows": 8, "seq_len": 64, "evaluation": 640, "trained_on": 512, "replaced": 0.1},
    "seconds": {"select": 1.0, "transfer": 2.5},
    "run": {"device": "cpu", "dtype": "float32"},
    "config": {"ratio": None, "select": {"lr": 0.5}},
    "versions": {"trsp_fast": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip


class Page(html.parser.HTMLParser):
    """Collects text, and refuses tags that are closed in another order than opened or that need a network."""

    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, attributes):
        assert tag != "script"
        assert not any(name in ("src", "href") for name, _ in attributes)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)
