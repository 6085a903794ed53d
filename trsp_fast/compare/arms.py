"""The arms of a comparison: who chooses the layers, and on what the calibration tokens are spent.

All arms have the same tokens in the same order, the same passes over them, the same optimiser, learning rate, warm-up
and clipping: those of the configuration. An arm says only what is minimised, and when the layers leave the function;
with noise (`transfer.noise`, in the arms that train as `trsp` does) some of the tokens are replaced.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trsp_fast.config import PRESETS, TRSPConfig, merge
from trsp_fast.errors import UserError
from trsp_fast.select import METHODS

CORE = ("trsp", "trsp-paper", "lm-then-cut", "cut-sleb-lm", "cut-sleb-distill", "cut-shortgpt-distill", "sleb")
PARTS = (
    "trsp",
    "trsp-judge-cut",
    "trsp-even-lr",
    "trsp-no-noise",
    "trsp-no-fold",
    "trsp-no-hidden",
    "trsp-fold",
    "trsp-untrained",
)

# What the optimiser does with the tokens; the same in all arms, whatever a preset says.
_COMMON = ("epochs", "lr", "warmup", "clip", "optimizer", "trainable")

_PLAIN: dict[str, Any] = {
    "objective": "lm",
    "gate": "none",
    "lambda2": 0.0,
    "hidden": 0.0,
    "noise": 0.0,
    "fold": "none",
    "gap_lr": 1.0,
}
_CUT: dict[str, Any] = {**_PLAIN, "gate": "anneal", "hold": 1.0}  # gates at 0 from the first step: bypassed
_FOLD: dict[str, Any] = {"gate": "anneal", "hold": 1.0, "fold": "alone"}
_PAPER: dict[str, Any] = {**PRESETS["paper"]["transfer"], "hidden": 0.0}


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    about: for the table's readers, one line.
    select: changes of the configuration's `select`; None removes nothing.
    transfer: changes of its `transfer`; None does not train.
    merges: layers are merged (LaCo) instead of chosen and cut.
    """

    name: str
    about: str
    select: dict[str, Any] | None = None
    transfer: dict[str, Any] | None = None
    merges: bool = False

    def config(self, base: TRSPConfig, seed: int) -> TRSPConfig:
        """The configuration of one run of this arm."""
        values = merge(base.to_dict(), {"seed": seed, "select": self.select or {}, "transfer": self.transfer or {}})
        values["transfer"] |= {name: getattr(base.transfer, name) for name in _COMMON}
        return TRSPConfig.from_dict(values)


def _named() -> dict[str, Arm]:
    arms = [
        Arm("dense", "nothing removed, nothing trained"),
        Arm("dense-lm", "nothing removed, trained on the same tokens", None, _PLAIN),
        Arm(
            "trsp",
            "this configuration; by default cut, folded, distilled from logits and hidden states, noise",
            {},
            {},
        ),
        Arm("trsp-paper", "as published: gates on the output, l2 penalty, all layers on", _paper_choice(), _PAPER),
        Arm("trsp-l1", "as published, with the l1 penalty", _paper_choice(), {**_PAPER, "norm": "l1"}),
        Arm("trsp-oneshot", "this configuration, all layers chosen after one round", {"schedule": "oneshot"}, {}),
        Arm(
            "trsp-anneal",
            "chosen as by trsp, gates annealed over 70% of the steps, distilled",
            {},
            {**_PLAIN, "objective": "distill", "gate": "anneal", "hold": 0.3},
        ),
        Arm("trsp-judge-cut", "this configuration, layers judged by their direct cut", {"judge": "cut"}, {}),
        Arm("trsp-even-lr", "this configuration, all layers at one learning rate", {}, {"gap_lr": 1.0}),
        Arm("trsp-no-noise", "this configuration, on the text as it is", {}, {"noise": 0.0}),
        Arm("trsp-no-fold", "this configuration, trained from the direct cut", {}, {"fold": "none"}),
        Arm("trsp-no-hidden", "this configuration, imitating logits alone", {}, {"hidden": 0.0}),
        Arm("trsp-untrained", "chosen as by trsp, cut, not trained", {}),
        Arm("trsp-fold", "chosen as by trsp, cut, folded in closed form, not trained", {}, _FOLD),
        Arm("lm-then-cut", "chosen as by trsp, trained without penalty, then cut", {}, _PLAIN),
        Arm("laco", "layers merged (LaCo), not trained", merges=True),
    ]
    for method in METHODS:
        choice: dict[str, Any] = {} if method == "trsp" else {"method": method}
        if method != "trsp":
            arms.append(Arm(method, f"chosen by {method}, cut, not trained", choice))
        arms.append(Arm(f"cut-{method}-lm", f"chosen by {method}, cut, then trained", choice, _CUT))
        distilled = {**_CUT, "objective": "distill"}
        noisy = {name: value for name, value in distilled.items() if name != "noise"}  # as the configuration has it
        about = f"chosen by {method}, cut, then distilled from logits"
        arms.append(Arm(f"cut-{method}-distill", about, choice, distilled))
        arms.append(Arm(f"cut-{method}-distill-noise", f"{about}, on tokens with trsp's noise", choice, noisy))
        if method != "trsp":
            arms.append(Arm(f"cut-{method}-fold", f"chosen by {method}, cut, folded in closed form", choice, _FOLD))
            arms.append(Arm(f"cut-{method}-imitate", f"chosen by {method}, then trained as trsp is", choice, {}))
    return {arm.name: arm for arm in arms}


def _paper_choice() -> dict[str, Any]:
    return {"method": "trsp", "schedule": "iterative", **PRESETS["paper"]["select"]}


ARMS = _named()


def chosen_arms(names: str | Iterable[str]) -> list[Arm]:
    """The arms by name, `dense` first: it is what all others are measured against.

    Args:
        names: with commas or one by one; `core`, `parts` (the method without one of its parts) and `all` stand for
            many.

    Raises:
        UserError: there is no such arm.
    """
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",")]
    groups = {"core": CORE, "parts": PARTS, "all": tuple(ARMS)}
    wanted = list(dict.fromkeys(["dense", *(one for name in names for one in groups.get(name, (name,)))]))
    for name in wanted:
        if name not in ARMS:
            raise UserError(f"there is no arm {name!r}; give core, parts, all, or some of {', '.join(ARMS)}.")
    return [ARMS[name] for name in wanted]
