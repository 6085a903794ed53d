"""Dropping layers from a KV cache in place against building a smaller cache by copies.

python bench/bench_kv_cache.py [--device cuda] [--json FILE]

Sizes are of the cache of a 7B model (32 layers, 32 heads of 128), a quarter of the layers dropped. `rebuild` is what a
cache without a slab does: new tensors for the layers that stay, filled by copies. Moves are also given as a share of
the bandwidth of a copy of as many bytes (read and written bytes, for both).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from transformers import LlamaConfig

from trsp_fast.models.kv_cache import SlabCache

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--tokens", type=int, help="per sequence; default: 4096 on a GPU, 1024 on a CPU")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per row")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        measure.set_allocator(measure.KEEP_MEMORY)
    elif not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA GPU, and none is visible.")
    tokens = arguments.tokens = arguments.tokens or (4096 if arguments.device == "cuda" else 1024)
    content: dict[str, Any] = {
        "machine": measure.machine(arguments.device), "layers": arguments.layers, "tokens": tokens,
        "dtype": arguments.dtype, "rows": [],
    }  # fmt: skip
    for filled in (tokens, tokens // 2):
        content["rows"] += rows_of(arguments, tokens, filled)
        if arguments.json:
            measure.write(arguments.json, content)
    print(f"{'filled':>7} {'step':22} {'ms':>9} {'GB/s':>8} {'of copy':>8} {'rebuild/ours':>13}")
    for row in content["rows"]:
        shown = [f"{row[name]:{width}}" if row[name] is not None else " " * 8 for name, width in
                 (("gb_per_s", "8.1f"), ("of_copy", "8.2f"), ("rebuild_over_ours", "13.1f"))]  # fmt: skip
        print(f"{row['filled']:7} {row['step']:22} {row['median_ms']:9.3f}", *shown)


def make(arguments: argparse.Namespace, tokens: int, filled: int) -> SlabCache:
    """A cache whose contents are random, with room for `tokens` and as many held as `filled`."""
    cache = SlabCache(LlamaConfig(num_hidden_layers=arguments.layers), max_len=tokens)
    generator = torch.Generator(arguments.device).manual_seed(0)
    for layer in range(arguments.layers):
        states = [
            torch.randn(1, 32, filled, 128, generator=generator, device=arguments.device).to(DTYPES[arguments.dtype])
            for _ in range(2)
        ]
        cache.update(*states, layer)
    return cache


def check(arguments: argparse.Namespace, dropped: list[int], want: list, longer: int, filled: int) -> None:
    """End the bench unless the moves keep what the rebuilt layers hold."""
    cache = make(arguments, arguments.tokens, filled)
    cache.drop_layers(dropped)
    for step in (cache.compact, lambda: cache.regrid(max_len=longer)):
        step()
        for index, (keys, values) in enumerate(want):
            view = cache.view(index)
            if not (torch.equal(view.keys, keys[:, :, :filled]) and torch.equal(view.values, values[:, :, :filled])):
                sys.exit(f"the cache holds something else after a move (layer {index}): nothing is timed.")


def rows_of(arguments: argparse.Namespace, tokens: int, filled: int) -> list[dict[str, Any]]:
    """Each step on a fresh copy of the cache, its result compared with the rebuilt one before anything is timed."""
    device, dropped = arguments.device, list(range(1, arguments.layers, 4))
    kept = [layer for layer in range(arguments.layers) if layer not in dropped]
    whole = make(arguments, tokens, filled)
    bytes_per_layer = whole.layers[0].keys[:, :, :filled].nbytes * 2

    def rebuild() -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = []
        for layer in kept:
            held = whole.layers[layer]
            pair = tuple(torch.empty_like(part) for part in (held.keys, held.values))
            for new, old in zip(pair, (held.keys, held.values), strict=True):
                new[:, :, :filled] = old[:, :, :filled]
            found.append(pair)
        return found

    want = rebuild()
    shape, slots = list(whole._shape), [layer.slot for layer in whole.layers]
    ops, slab = torch.ops.trsp_fast, whole._slab
    longer = tokens * arguments.layers // len(kept)
    after = [*shape[:2], longer, *shape[3:]]
    scratch = slab.new_empty(bytes_per_layer // slab.element_size())
    moved = sum(slot != index for index, slot in enumerate(kept))

    check(arguments, dropped, want, longer, filled)
    del want

    def drop() -> None:
        # What drop_layers does to the tensors: nothing. Timed with its bookkeeping, on a cache of the same layers.
        fresh = SlabCache(LlamaConfig(num_hidden_layers=arguments.layers), max_len=tokens)
        fresh.drop_layers(dropped)

    def prepare() -> None:
        SlabCache(LlamaConfig(num_hidden_layers=arguments.layers), max_len=tokens)

    source, target = slab[: len(slab) // 4], slab[-(len(slab) // 4) :]
    functions: dict[str, Callable[[], Any]] = {
        "drop_layers": drop,
        "making a cache": prepare,
        "compact": lambda: ops.kv_compact_(slab, kept, shape, [1, filled]),
        "regrid": lambda: ops.kv_regrid_(slab, scratch, len(kept), shape, after, [1, filled]),
        "rebuild": rebuild,
        "copy": lambda: target.copy_(source),
    }
    assert slots == list(range(arguments.layers))
    timings = measure.interleaved(functions, device, arguments.seconds)
    read_and_written = {
        "compact": 2 * moved * bytes_per_layer,
        "regrid": 2 * len(kept) * bytes_per_layer,  # what must move; the way through the scratch is not counted
        "rebuild": 2 * len(kept) * bytes_per_layer,
        "copy": 2 * source.nbytes,
    }
    rates = {name: size / timings[name].median / 1e9 for name, size in read_and_written.items()}
    return [
        {
            "filled": filled,
            "step": name,
            "median_ms": timing.median * 1e3,
            "p20_ms": timing.p20 * 1e3,
            "p80_ms": timing.p80 * 1e3,
            "gb_per_s": rates.get(name),
            "of_copy": rates[name] / rates["copy"] if name in rates else None,
            "rebuild_over_ours": timings["rebuild"].median / timing.median,
        }
        for name, timing in timings.items()
    ]


if __name__ == "__main__":
    main()
