"""Speed of a model as it is used: reading a prompt, and generating with a KV cache."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

from trsp_fast.engine.memory import is_out_of_memory
from trsp_fast.errors import UserError
from trsp_fast.models.families import layer_stack
from trsp_fast.report.footprint import busy_seconds, peak_growth

PROMPT, NEW_TOKENS, BATCH, REPEATS = 64, 32, 8, 3
CACHES = ("dynamic", "static", "compiled")
START = 1  # tokens that a sequence of the throughput begins with: the time is that of generating
RECOMPILES = 16  # per model; beyond its own limit torch would silently stop compiling


@dataclass(frozen=True)
class Protocol:
    """What `compare_speed` times; by default what the paper's table 2 does (arXiv 2505.18232).

    batch, new_tokens: sequences that are generated at once, and the tokens of each: the throughput.
    prompt: tokens of the one sequence that is read until its first new token is there: the latency.
    rounds: timed ones, after one that warms up and one that measures memory.
    caches: of the generation: `dynamic`, which transformers uses by default, `static`, or `compiled`: static, with the
        step of decoding through torch.compile.
    """

    batch: int = 64
    new_tokens: int = 128
    prompt: int = 2048
    rounds: int = 5
    caches: tuple[str, ...] = CACHES[:1]

    def __post_init__(self) -> None:
        for name in ("batch", "new_tokens", "prompt", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', '-')} is {getattr(self, name)}; give 1 or more.")

    def within(self, models: Sequence[PreTrainedModel]) -> tuple["Protocol", list[str]]:
        """The protocol in the shortest of the models' contexts, and a sentence for each length that was cut."""
        context = min(_context(model) for model in models)
        prompt, new_tokens = min(self.prompt, context), min(self.new_tokens, context - START)
        lengths = {"the prompt": (prompt, self.prompt), "generation": (new_tokens, self.new_tokens)}
        notes = [
            f"{what} has {cut} tokens, not {wanted}, in a context of {context}."
            for what, (cut, wanted) in lengths.items()
            if cut < wanted
        ]
        return dataclasses.replace(self, prompt=prompt, new_tokens=new_tokens), notes


@dataclass
class Measured:
    """One kind of work of one model.

    seconds: median of `rounds`, the seconds of each.
    peak_bytes: the model's weights and what the work takes beside them; None where the system does not tell.
    host_bound: share of the time in which the GPU waits for the host; None on a CPU.
    times_first, peak_of_first: so many times as fast as the first model, and its peak times this.
    """

    seconds: float
    rounds: list[float]
    tokens_per_second: float
    peak_bytes: int | None
    host_bound: float | None
    times_first: float = 1.0
    peak_of_first: float | None = None

    def relate(self, first: "Measured") -> None:
        self.times_first = first.seconds / self.seconds
        self.peak_of_first = self.peak_bytes / first.peak_bytes if self.peak_bytes and first.peak_bytes else None


@dataclass
class ModelSpeed:
    """A model's size, the latency of a prompt (its tokens per second are the prompt's), throughput by kind of cache."""

    layers: int
    parameters: int
    weight_bytes: int
    latency: Measured
    generation: dict[str, Measured]
    parameters_of_first: float = 1.0

    def relate(self, first: "ModelSpeed") -> None:
        self.parameters_of_first = self.parameters / first.parameters
        self.latency.relate(first.latency)
        for cache, measured in self.generation.items():
            measured.relate(first.generation[cache])


def compare_speed(
    models: Sequence[PreTrainedModel],
    protocol: Protocol,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ModelSpeed]:
    """Throughput and latency of each model, in turn round by round so that a noisy machine hits all alike.

    Args:
        models: on one device; they may share weights.
        protocol: what is timed; it fits into all their contexts, see `Protocol.within`.
        progress: told of each piece of work, (done, total).

    Raises:
        UserError: a batch does not fit into memory, or a model's decoding cannot be compiled.
    """
    subjects = [_Subject(model, protocol) for model in models]
    turns: list[Callable[[_Subject, str], None]] = [_Subject.warm_up, _Subject.measure_memory]
    turns += [_Subject.time] * protocol.rounds + [_Subject.measure_host]
    pieces = [(turn, subject, name) for turn in turns for name in subjects[0].works for subject in subjects]
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=RECOMPILES * len(subjects)):
        for index, (turn, subject, name) in enumerate(pieces):
            with _memory_in_a_sentence(protocol):
                turn(subject, name)
            progress(index + 1, len(pieces))
    found = [subject.speed() for subject in subjects]
    for speed in found:
        speed.relate(found[0])
    return found


class _Subject:
    """A model, its kinds of work by name (`latency` and the caches), and what is known of each so far."""

    def __init__(self, model: PreTrainedModel, protocol: Protocol) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.tokens = {"latency": protocol.prompt}
        self.works: dict[str, Callable[[], None]] = {
            "latency": functools.partial(_generate, model, 1, protocol.prompt, 1)
        }
        for cache in protocol.caches:
            self.tokens[cache] = protocol.batch * protocol.new_tokens
            options = _cache_options(cache, self.device)
            self.works[cache] = functools.partial(_generate, model, protocol.batch, START, protocol.new_tokens, options)
        self.seconds: dict[str, list[float]] = {name: [] for name in self.works}
        self.growth: dict[str, int | None] = {}
        self.busy: dict[str, float | None] = {}

    def warm_up(self, name: str) -> None:
        self.works[name]()
        if name == "compiled" and not hasattr(self.model, "_compiled_call"):
            raise UserError(
                f"transformers does not compile the decoding of {type(self.model).__name__}; leave out --compile."
            )

    def measure_memory(self, name: str) -> None:
        self.growth[name] = peak_growth(self.works[name], self.device)

    def time(self, name: str) -> None:
        self.seconds[name].append(_seconds(self.works[name], self.device))

    def measure_host(self, name: str) -> None:
        """After the timing: the profiler takes the host's time."""
        self.busy[name] = busy_seconds(self.works[name], self.device)

    def speed(self) -> ModelSpeed:
        weights = {p.data_ptr(): p.nbytes for p in self.model.parameters()}
        size = sum(weights.values())
        found = {name: self._measured(name, size) for name in self.works}
        return ModelSpeed(
            layers=len(layer_stack(self.model)),
            parameters=_parameters(self.model),
            weight_bytes=size,
            latency=found.pop("latency"),
            generation=found,
        )

    def _measured(self, name: str, weights: int) -> Measured:
        seconds, growth, busy = statistics.median(self.seconds[name]), self.growth[name], self.busy[name]
        return Measured(
            seconds=seconds,
            rounds=self.seconds[name],
            tokens_per_second=self.tokens[name] / seconds,
            peak_bytes=None if growth is None else weights + growth,
            host_bound=None if busy is None else max(0.0, 1 - busy / seconds),
        )


@contextmanager
def _memory_in_a_sentence(protocol: Protocol) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"a batch of {protocol.batch} with {protocol.new_tokens} new tokens, or a prompt of {protocol.prompt}, "
            "does not fit into memory beside the models; give a smaller --batch or --prompt."
        ) from None


@torch.no_grad()
def measure_speed(models: dict[str, PreTrainedModel]) -> dict[str, dict[str, float]]:
    """Tokens per second of each model, interleaved in one process so that a noisy machine hits all alike.

    Returns:
        By model: `prompt_tokens_per_second` and `generated_tokens_per_second` (medians of 3 after a warm-up; batch 8,
        64 prompt tokens, 32 new ones), and `parameters`.
    """
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for repeat in range(REPEATS + 1):
        for name, model in models.items():
            measured = _rates(model)
            if repeat:
                rates[name].append(measured)
    return {
        name: {
            "prompt_tokens_per_second": statistics.median(prompt for prompt, _ in rates[name]),
            "generated_tokens_per_second": statistics.median(generated for _, generated in rates[name]),
            "parameters": _parameters(model),
        }
        for name, model in models.items()
    }


@torch.no_grad()
def seconds_of_a_round(model: PreTrainedModel) -> float:
    """What one round of `measure_speed` takes for a model; there are `REPEATS` + 1 of them."""
    began = time.perf_counter()
    _rates(model)
    return time.perf_counter() - began


def _rates(model: PreTrainedModel) -> tuple[float, float]:
    """Tokens per second of one prompt pass and of one generation that includes its own prompt pass."""
    device, context = next(model.parameters()).device, _context(model)
    length = min(PROMPT, context // 2)
    new = min(NEW_TOKENS, context - length)
    tokens = torch.ones(BATCH, length, dtype=torch.long, device=device)
    prompt = _seconds(lambda: model(input_ids=tokens, use_cache=False), device)
    generated = _seconds(lambda: _generate(model, BATCH, length, new), device)
    return BATCH * length / prompt, BATCH * new / generated


def _generate(
    model: PreTrainedModel, batch: int, length: int, new: int, cache_options: dict[str, Any] | None = None
) -> None:
    """Exactly `new` greedy tokens for each of `batch` prompts of `length` tokens."""
    tokens = torch.ones(batch, length, dtype=torch.long, device=next(model.parameters()).device)
    options: dict[str, Any] = {
        **(cache_options or {}),
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "use_cache": True,
        "num_beams": 1,
    }
    options |= {"attention_mask": torch.ones_like(tokens), "min_new_tokens": new, "max_new_tokens": new}
    found = model.generate(tokens, **options)
    assert found.shape == (batch, length + new)


def _cache_options(cache: str, device: torch.device) -> dict[str, Any]:
    """What `generate` is told; it compiles decoding with a static cache unless forbidden, on a CPU when asked to."""
    if cache == "dynamic":
        return {}
    if cache == "static":
        return {"cache_implementation": "static", "disable_compile": True}
    compiled = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")
    compiled._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compiled}


def _context(model: PreTrainedModel) -> int:
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 4096


def _parameters(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
