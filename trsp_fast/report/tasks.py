"""Scores of a model in memory on tasks of lm-evaluation-harness (the extra `tasks`)."""

import contextlib
import functools
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from trsp_fast.engine.objective import INFERENCE_BATCH
from trsp_fast.errors import UserError

FEWSHOT_SEED = 1234  # lm-eval's own, which published figures are made with


def score_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: list[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
) -> dict[str, float]:
    """Accuracy (`acc`) by task, or the first figure that a task reports where it has none; without a chat template.

    A name that stands for several tasks has its own score where lm-eval makes one, else those of its tasks.

    Args:
        model: a transformers causal language model.
        tokenizer: the model's.
        tasks: names as lm-eval knows them.
        limit: so many examples of each task, for a first look.
        include_path: a folder with task definitions of one's own.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, or what it needs cannot be had.
    """
    manager = task_manager(tasks, include_path)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    device, training = next(model.parameters()).device, model.training
    batch: int | str = "auto" if device.type == "cuda" else INFERENCE_BATCH
    with _bars():
        named = {name: _named(manager, name) for name in dict.fromkeys(tasks)}
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(device))
        loaded = manager.load([one for whole, _ in named.values() for one in whole])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        # Not simple_evaluate, which reseeds the process and asks pip and nvidia-smi about it for 10 s each time.
        found = lm_eval.evaluate(harness, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    model.train(training)
    scores: dict[str, float | None] = {}
    for name, (_, parts) in named.items():
        own = _score(found["results"].get(name, {}))
        scores |= {name: own} if own is not None else {part: _score(found["results"][part]) for part in parts}
    return {name: score for name, score in scores.items() if score is not None}


def _bars() -> contextlib.AbstractContextManager[Any]:
    """lm-eval's bars, which cannot be switched off, stay out of what is no terminal."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())


def task_manager(tasks: Sequence[str], include_path: str | Path | None = None) -> Any:
    """lm-eval's index of tasks, in which all `tasks` are; asked before a model is loaded for nothing.

    Raises:
        UserError: lm-eval is not installed, or a task is unknown.
    """
    try:
        import accelerate  # noqa: F401 - lm-eval's wrapper of models needs it and does not require it
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"tasks need lm-eval, and {error.name!r} is not installed; run pip install 'trsp_fast[tasks]'."
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"the task path {str(include_path)!r} is no folder; give one with task definitions.")
    # The harness has thousands of definitions, read in 10 s: only where the folder lacks a task.
    for defaults in (False, True) if include_path is not None else (True,):
        manager = _index(None if include_path is None else str(include_path), defaults)
        unknown = [name for name in tasks if name not in manager.all_tasks]
        if not unknown:
            return manager
    raise UserError(f"task {unknown[0]!r} is unknown to lm-eval; give names of its list, or --task-path.")


@functools.cache
def _index(include_path: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=defaults)


def _named(manager: Any, name: str) -> tuple[list[Any], list[str]]:
    """What a name stands for, with its data: one task, several, or a group; and the names of all tasks in it."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # data that is offline, gated or gone surfaces as any of a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"task {name!r} cannot be loaded ({reason}); give another, or mend its definition.") from None
    group = loaded.get("groups", {}).get(name)
    return list(loaded["tasks"].values()) if group is None else [group], list(loaded["tasks"])


def _score(values: dict[str, Any]) -> float | None:
    """`acc` before all other figures; lm-eval's keys are "metric,filter", beside names and counts."""
    figures = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
    figures = {key: value for key, value in figures.items() if not key.split(",")[0].endswith("_stderr")}
    accuracy = [value for key, value in figures.items() if key.split(",")[0] == "acc"]
    return float(next(iter([*accuracy, *figures.values()]))) if figures else None
