"""Token sources: hub datasets, local text / jsonl / parquet / token tensors, chat data, and the built-in demo."""

import hashlib
import json
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trsp_fast.errors import UserError

# name -> (hub id, configuration, calibration split, evaluation split, column, options of load_dataset)
HUB_DATASETS: dict[str, tuple[str, str | None, str, str, str, dict[str, Any]]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "test", "text", {}),
    "c4": (
        "allenai/c4",
        None,
        "train",
        "validation",
        "text",
        {
            "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            }
        },
    ),
    "ptb": ("ptb-text-only/ptb_text_only", None, "train", "test", "sentence", {}),
    "alpaca": ("tatsu-lab/alpaca", None, "train[:90%]", "train[90%:]", "text", {}),
}

EVALUATION_SHARE = 10  # one in so many tokens of a local file is kept for evaluation, at its end
LARGEST_TEXT = 1 << 26  # characters of a hub split that are read: c4's first file alone has 800 million

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Streams:
    """Two disjoint token streams: int64 `[tokens]`, or `[samples, seq]` where the source fixes windows."""

    calibration: Tensor
    evaluation: Tensor


def load_streams(source: str, tokenizer: Any, evaluation: str | None = None) -> Streams:
    """Tokens to calibrate and to evaluate on.

    Hub datasets and `demo` have their own splits. Of a path the last tenth is kept for evaluation, unless `evaluation`
    names another source; text is joined by blank lines into one stream.

    Args:
        source: `wikitext2`, `c4`, `ptb`, `alpaca`, `demo`, or a path: .txt, .jsonl, .parquet, a folder saved by
            `datasets`, .safetensors with an integer tensor `tokens` [samples, seq].
        tokenizer: a transformers tokenizer; None is enough for .safetensors.

    Raises:
        UserError: an unknown, unreadable or empty source.
    """
    if evaluation is not None:
        return Streams(_load(source, tokenizer, "calibration"), _load(evaluation, tokenizer, "evaluation"))
    if source == "demo" or source in HUB_DATASETS:
        return Streams(_load(source, tokenizer, "calibration"), _load(source, tokenizer, "evaluation"))
    stream = _load(source, tokenizer, "calibration")
    first = len(stream) - len(stream) // EVALUATION_SHARE
    return Streams(stream[:first], stream[first:])


def evaluation_stream(source: str, tokenizer: Any) -> Tensor:
    """All tokens of `source` (of a hub dataset or `demo`: of its evaluation split); see `load_streams`."""
    return _load(source, tokenizer, "evaluation")


def windows(stream: Tensor, length: int) -> Tensor:
    """Non-overlapping windows, int64 `[windows, length]`; the rest of the stream is dropped.

    Raises:
        UserError: the stream is shorter than one window, or its windows have another length.
    """
    if stream.dim() == 2:
        if stream.shape[1] < length:
            raise UserError(f"the data has windows of {stream.shape[1]} tokens, {length} are wanted; set data.seq_len.")
        return stream[:, :length]
    if len(stream) < length:
        raise UserError(
            f"the data has {len(stream)} tokens, less than one window of {length}; give more text or set data.seq_len."
        )
    return stream[: len(stream) // length * length].view(-1, length)


def calibration_windows(stream: Tensor, samples: int, length: int, seed: int) -> Tensor:
    """`samples` windows drawn without replacement by `seed`; all of them where there are fewer."""
    pool = windows(stream, length)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order[:samples]]


def with_noise(tokens: Tensor, share: float, seed: int) -> Tensor:
    """About `share` of the tokens replaced by ones drawn from all of them; a function of `seed` alone.

    What a student imitates of its teacher is defined on any input, and inputs off the text keep it near the teacher on
    more than the text: both see the same ones, as with the augmentations of Beyer et al. (arXiv 2106.05237).

    Args:
        tokens: int64 `[samples, seq]`; it stays as it is.
    """
    if not share:
        return tokens
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens.shape, generator=generator) < share  # on the CPU: the same on every machine
    others = torch.randint(tokens.numel(), tokens.shape, generator=generator)
    return torch.where(chosen.to(tokens.device), tokens.flatten()[others.to(tokens.device)], tokens)


def evaluation_windows(stream: Tensor, length: int, most: int | None = None) -> Tensor:
    """The windows in order, or `most` of them evenly spaced."""
    pool = windows(stream, length)
    if most is None or len(pool) <= most:
        return pool
    return pool[torch.linspace(0, len(pool) - 1, most).long()]


def check_source(source: str | None) -> None:
    """Raise `UserError` if `source` is neither a known name nor a path that exists; None is no source."""
    if source is not None and source != "demo" and source not in HUB_DATASETS and not Path(source).exists():
        raise UserError(f"data {source!r} does not exist; give a path, or one of demo, {', '.join(HUB_DATASETS)}.")


def window_length(model_config: Any, wanted: int) -> int:
    """The window length for a model: `wanted`, or min(2048, context) for 0.

    Raises:
        UserError: `wanted` exceeds the model's context.
    """
    context = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048
    if wanted > context:
        raise UserError(f"data.seq_len is {wanted}, longer than the model's context of {context}; set it to {context}.")
    if wanted == 1:
        raise UserError("data.seq_len is 1; a window needs at least 2 tokens to have a next one.")
    return wanted or min(2048, context)


def check_vocabulary(tokens: Tensor, vocabulary: int) -> None:
    """Raise `UserError` if a token id does not exist in the model."""
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        worst = int(tokens.max()) if int(tokens.max()) >= vocabulary else int(tokens.min())
        raise UserError(
            f"the data has token {worst}, the model knows 0 to {vocabulary - 1}; use the model's tokenizer."
        )


def standard_library(split: str) -> list[str]:
    """The demo corpus: sources of the running interpreter's standard library, test folders excluded, in path order.

    A file is held out if sha256 of its relative path is divisible by 10: another Python version then never evaluates
    on a file that the demo model was trained on.

    Args:
        split: "train" or "held-out".
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _NOT_LIBRARY.intersection(relative.parts):
            continue
        held_out = int(hashlib.sha256(relative.as_posix().encode()).hexdigest(), 16) % 10 == 0
        if held_out == (split == "held-out"):
            texts.append(path.read_text(encoding="utf-8", errors="ignore"))
    return [text for text in texts if text.strip()]


def corpus_digest(texts: list[str]) -> str:
    """sha256 over the texts: tells whether two machines read the same corpus."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def demo_model() -> Path:
    """The folder of the built-in model: a 12-layer Llama trained on the standard library's sources."""
    return Path(__file__).parent / "demo_model"


def _load(source: str, tokenizer: Any, part: str) -> Tensor:
    if str(source).endswith(".safetensors"):
        return _token_file(Path(source))
    if tokenizer is None:
        raise UserError(
            f"data {source!r} is text and no tokenizer was given; give one, or a .safetensors file of tokens."
        )
    text = "\n\n".join(_texts(source, tokenizer, part))
    if not text.strip():
        raise UserError(f"data {source!r} is empty; give text.")
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def _texts(source: str, tokenizer: Any, part: str) -> Iterable[str]:
    if source == "demo":
        return standard_library("train" if part == "calibration" else "held-out")
    if source in HUB_DATASETS:
        return _hub_texts(source, part)
    check_source(source)
    try:
        return _path_texts(Path(source), tokenizer)
    except UserError:
        raise
    except (OSError, UnicodeDecodeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data {source!r} cannot be read ({reason}); give a readable file.") from None


def _path_texts(path: Path, tokenizer: Any) -> list[str]:
    if path.is_dir():
        from datasets import Dataset, load_from_disk

        dataset = load_from_disk(str(path))
        if not isinstance(dataset, Dataset):
            dataset = dataset[next(iter(dataset))]
        return [_row_text(row, tokenizer, path) for row in dataset]
    if path.suffix == ".txt" or path.suffix == ".raw":
        return [path.read_text(encoding="utf-8")]
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8").splitlines()
        return [_row_text(json.loads(line), tokenizer, path) for line in lines if line.strip()]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return [_row_text(row, tokenizer, path) for row in pyarrow.parquet.read_table(path).to_pylist()]
    raise UserError(f"data {str(path)!r} is of no known kind; give .txt, .jsonl, .parquet, .safetensors or a folder.")


def _row_text(row: Any, tokenizer: Any, path: Path) -> str:
    """One row of a table: its `text`, or its `messages` through the tokenizer's chat template."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and row.get("messages"):
        if not tokenizer.chat_template:
            raise UserError(f"data {str(path)!r} holds messages, but the tokenizer has no chat template; give text.")
        return tokenizer.apply_chat_template(row["messages"], tokenize=False)
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise UserError(f"data {str(path)!r} has a row with {found}; every row needs a field text or messages.")


def _hub_texts(name: str, part: str) -> list[str]:
    import datasets

    hub_id, configuration, calibration, evaluation, column, options = HUB_DATASETS[name]
    split = calibration if part == "calibration" else evaluation
    try:
        rows = datasets.load_dataset(hub_id, configuration, split=split, **options)[column]
    except Exception as error:  # offline, gated, moved: the hub raises dozens of kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"data {name!r} cannot be fetched ({reason}); give a local file instead.") from None
    texts, characters = [], 0
    for text in rows:
        texts.append(text)
        characters += len(text)
        if characters > LARGEST_TEXT:
            break
    return texts


def _token_file(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"data {str(path)!r} cannot be read ({error}); give a safetensors file of tokens.") from None
    tokens = tensors.get("tokens")
    if tokens is None or tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        found = "no such tensor" if tokens is None else f"{tokens.dtype} {list(tokens.shape)}"
        raise UserError(f"data {str(path)!r} needs an integer tensor tokens [samples, seq]; it has {found}.")
    if not len(tokens):
        raise UserError(f"data {str(path)!r} has no rows; give at least one window of tokens.")
    return tokens.long()
