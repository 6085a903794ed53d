"""SlabCache: the KV cache of all layers in one allocation, so that it shrinks with the model.

One slab holds a slot per layer, `[K, V]`; what a layer keeps are views of its slot. Taking layers out is bookkeeping,
and what they leave becomes longer sequences or more of them, in place (csrc/kv_moves.h).

Longer than other files because transformers asks the cache and its layers for one thing in two halves.
"""

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from trsp_fast.config import checked_layers
from trsp_fast.errors import UserError
from trsp_fast.models.kv_moves import SlotShape, slot_views


class SlabCache(Cache):
    """A transformers cache of full-attention layers in one allocation; give it as `past_key_values`.

    Memory is taken at the first update, when heads, widths, dtype and device are known. K and V of one layer have shape
    (batch, heads, length, width). With `static=False` an update returns the filled part, with `static=True` the full
    length, as `StaticCache` does, for torch.compile and CUDA graphs.

    A layer that was bypassed holds nothing; lengths and masks are those of the longest layer, so bypassing layer 0 is
    right here, while other caches take their length from layer 0.

    Args:
        config: the model's configuration.
        max_len: tokens that each sequence may have.
        max_batch: sequences (beams count each).
        static: see above.

    Raises:
        UserError: the model's layers are not all of plain attention, or a size is not positive.
    """

    def __init__(self, config: Any, *, max_len: int, max_batch: int = 1, static: bool = False) -> None:
        self._begin(_layer_count(config, max_len), max_len, max_batch, static)

    def _begin(self, layers: int, max_len: int, max_batch: int, static: bool) -> None:
        _check_sizes(max_len, max_batch)
        self.max_len, self.max_batch, self.static = max_len, max_batch, static
        self.generation = 0
        self._slab: Tensor | None = None
        self._shape: SlotShape | None = None
        self.layers: list[SlabLayer]
        super().__init__(layers=[SlabLayer(self, slot) for slot in range(layers)])

    # ---- what transformers asks of the whole cache

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens in the cache; for layer 0, which callers mean as "the" length, that of the longest layer."""
        if layer_idx != 0:
            return self.layers[layer_idx].get_seq_length() if layer_idx < len(self.layers) else 0
        lengths = [layer.get_seq_length() for layer in self.layers]
        if not self.static:
            return max(lengths)
        tensors = [length for length in lengths if isinstance(length, Tensor)]
        return torch.stack(tensors).amax() if tensors else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return (self.max_len, 0) if self.static else (self.get_seq_length() + query_length, 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence; a negative number, as transformers counts them."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}; -n forgets n tokens.")
        length = int(self.get_seq_length()) + tokens_to_remove
        if length < 0:
            raise ValueError(f"{-tokens_to_remove} tokens cannot be removed from {length - tokens_to_remove}.")
        for layer in self.layers:
            layer.shorten(length)

    def miss(self, layer: int) -> None:
        """A bypassed layer saw none of this pass; called by the bypass. It may be dropped, but not come back."""
        if layer < len(self.layers):
            self.layers[layer].missed = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "SlabCache":
        """A cache of its own, whose layers are views of its own slab."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        for layer in other.layers:
            layer._cache = weakref.ref(other)
        return other

    # ---- memory

    @property
    def nbytes(self) -> int:
        """Bytes of the slab; 0 before the first update."""
        return 0 if self._slab is None else self._slab.nbytes

    @property
    def capacity(self) -> int:
        """Tokens that each layer can hold, over all sequences."""
        return self.max_batch * self.max_len

    @property
    def free_bytes(self) -> int:
        """Bytes of the slab that belong to no layer: what `drop_layers` freed and `regrid` can use."""
        if self._slab is None or self._shape is None:
            return 0
        return self._slab.nbytes - len(self.layers) * self._shape.elements * self._slab.element_size()

    def longest(self, max_batch: int | None = None) -> int:
        """The largest `max_len` that fits into the slab with this many sequences."""
        if self._slab is None or self._shape is None:
            raise UserError("the cache has no memory yet; run the model once, or choose max_len when it is made.")
        per_token = len(self.layers) * (max_batch or self.max_batch) * self._shape.heads
        return self._slab.numel() // (per_token * (self._shape.key_width + self._shape.value_width))

    def allocate(self, shape: SlotShape, dtype: torch.dtype, device: torch.device) -> None:
        """Take the memory; called by the first layer that is updated."""
        with torch.inference_mode(False):  # a slab made in that mode could not be written to outside of it
            self._slab = torch.zeros(len(self.layers) * shape.elements, dtype=dtype, device=device)
        self._shape = shape

    def slot(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of a slot, views (max_batch, heads, max_len, width) of the slab."""
        assert self._slab is not None
        assert self._shape is not None
        with torch.inference_mode(False), torch.no_grad():
            return slot_views(self._slab, index, self._shape)

    # ---- surgery

    def drop_layers(self, layers: Iterable[int]) -> None:
        """Take layers out: the rest move up in number, no byte moves. What they held is lost, their memory free.

        Raises:
            UserError: layers out of range or repeated, none, or all.
        """
        removed = checked_layers(layers, len(self.layers))
        for index in removed:
            self.layers[index].forget()
        self.layers = [layer for index, layer in enumerate(self.layers) if index not in removed]
        if self._slab is None:  # the memory will be taken for those that stay
            for index, layer in enumerate(self.layers):
                layer.slot = index
        self.generation += 1

    def compact(self) -> None:
        """Move the layers that stay to the front of the slab, in place and with nothing beside it."""
        slots = [layer.slot for layer in self.layers]
        if slots == list(range(len(slots))):
            return
        if self._slab is not None and self._shape is not None:
            torch.ops.trsp_fast.kv_compact_(self._slab, slots, list(self._shape), self._filled())
        for index, layer in enumerate(self.layers):
            layer.slot = index
        self._rebind()

    def regrid(self, *, max_len: int | None = None, max_batch: int | None = None) -> None:
        """Give the sequences another largest length or number, in the same memory; what they hold stays.

        Needs beside the slab one layer's filled part at the most.

        Raises:
            UserError: it does not fit, or the cache holds more than that.
        """
        length = self.max_len if max_len is None else max_len
        batch = self.max_batch if max_batch is None else max_batch
        _check_sizes(length, batch)
        filled_batch, filled_length = self._filled()
        if length < max(filled_length, 1) or batch < max(filled_batch, 1):
            raise UserError(
                f"the cache holds {filled_batch} sequences of {filled_length} tokens, more than the {batch} x {length} "
                "asked for; crop it first or ask for more."
            )
        if self._slab is not None and self._shape is not None:
            if length > self.longest(batch):
                raise UserError(
                    f"{batch} x {length} tokens do not fit into the cache's {self.nbytes:,} bytes with "
                    f"{len(self.layers)} layers, at most {batch} x {self.longest(batch)} do; ask for less."
                )
            self.compact()
            after = self._shape._replace(batch=batch, length=length)
            per_token = self._shape.heads * (self._shape.key_width + self._shape.value_width)
            scratch = self._slab.new_empty(filled_batch * filled_length * per_token)
            torch.ops.trsp_fast.kv_regrid_(
                self._slab, scratch, len(self.layers), list(self._shape), list(after), [filled_batch, filled_length]
            )
            self._shape = after
        self.max_len, self.max_batch = length, batch
        self._rebind()

    def _filled(self) -> list[int]:
        """Sequences and tokens that hold something."""
        batch = max((layer.batch_size for layer in self.layers if layer.is_initialized), default=0)
        length = int(self.get_seq_length())
        return [batch if length else 0, length]

    def _rebind(self) -> None:
        self.generation += 1
        for layer in self.layers:
            layer.bind()

    # ---- what others keep of it

    def view(self, layer: int) -> "SlabView":
        """K and V of a layer for as long as nothing moves; using it after a move raises."""
        return SlabView(self, layer, self.generation)

    def guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` (a captured graph's `replay`, say) that raises once the memory it was made for has moved."""
        made = self.generation

        def call(*args: Any, **kwargs: Any) -> Any:
            self.check(made)
            return function(*args, **kwargs)

        return call

    def check(self, generation: int) -> None:
        """Raise RuntimeError if the cache was moved since it had this generation."""
        if generation != self.generation:
            raise RuntimeError(
                f"the cache has moved since (generation {generation}, now {self.generation}); "
                "capture the graph or take the view again."
            )

    # ---- other caches

    @classmethod
    def from_cache(
        cls, cache: Cache, *, max_len: int | None = None, max_batch: int | None = None, static: bool = False
    ) -> "SlabCache":
        """A copy of a DynamicCache, StaticCache or SlabCache, by default with room for what it holds and no more.

        Raises:
            UserError: it has layers of another kind, or they hold different lengths.
        """
        for layer in getattr(cache, "layers", [cache]):  # an encoder-decoder's has two caches and no layers
            if type(layer) not in (DynamicLayer, StaticLayer, SlabLayer):
                raise UserError(
                    f"a cache with a {type(layer).__name__} cannot be one slab; give plain attention layers."
                )
        held = [layer for layer in cache.layers if layer.is_initialized and int(layer.get_seq_length())]
        lengths = {int(layer.get_seq_length()) for layer in held}
        if not held or len(lengths) > 1:
            raise UserError(f"the cache's layers hold {sorted(lengths) or 'no'} tokens; give one with one length.")
        (length,), batch = lengths, held[0].keys.shape[0]
        slab = cls.__new__(cls)
        slab._begin(len(cache.layers), max_len or length, max_batch or batch, static)
        for index, layer in enumerate(cache.layers):
            if layer.is_initialized and int(layer.get_seq_length()):
                slab.update(layer.keys[:, :, :length], layer.values[:, :, :length], index)
        return slab

    def to_cache(self) -> DynamicCache:
        """A DynamicCache with copies of what this one holds."""
        cache = DynamicCache()
        for index, layer in enumerate(self.layers):
            length = int(layer.get_seq_length())
            if length:
                cache.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
        return cache


class SlabLayer(CacheLayerMixin):
    """One layer's part of a SlabCache: `keys` and `values` are views of its slot for the sequences at hand."""

    is_sliding = False
    is_croppable = True
    supports_early_init = True

    def __init__(self, cache: SlabCache, slot: int) -> None:
        super().__init__()
        self._cache: Any = weakref.ref(cache)  # a strong one would keep the slab until the garbage collector comes by
        self.slot = slot
        self.keys: Any = None
        self.values: Any = None
        self.missed = False
        with torch.inference_mode(False):
            self.cumulative_length: Any = torch.tensor(0) if cache.static else 0

    @property
    def is_compileable(self) -> bool:
        cache = self._cache()
        return cache is not None and cache.static

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        cache = self._living()
        batch, heads, _, key_width = key_states.shape
        if batch > cache.max_batch:
            raise UserError(
                f"{batch} sequences do not fit into a cache for {cache.max_batch}; give max_batch or regrid it."
            )
        shape = SlotShape(cache.max_batch, heads, cache.max_len, key_width, value_states.shape[-1])
        if cache._slab is None:
            cache.allocate(shape, key_states.dtype, key_states.device)
        assert cache._slab is not None
        if shape != cache._shape or key_states.dtype != cache._slab.dtype or key_states.device != cache._slab.device:
            raise UserError(
                f"the layers' keys and values differ ({tuple(shape[i] for i in (1, 3, 4))}, {key_states.dtype}, "
                f"{key_states.device} after others); such a model needs another cache."
            )
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        if cache.static:
            with torch.inference_mode(False):
                self.cumulative_length = self.cumulative_length.to(self.device)
        self.is_initialized = True
        self.bind()

    def bind(self) -> None:
        """Point `keys` and `values` at the slot as it is now."""
        if not self.is_initialized:
            return
        cache = self._living()
        self.keys, self.values = (part[: self.batch_size] for part in cache.slot(self.slot))
        if cache.static and not torch.compiler.is_compiling():
            for tensor in (self.keys, self.values, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise UserError("SlabCache keeps no gradients; run the model under torch.no_grad(), or without a cache.")
        cache = self._living()
        if self.missed:
            raise UserError(
                "a layer that was bypassed lacks what the others hold, so it cannot be used with this cache again; "
                "drop it from the cache, or reset the cache."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise UserError(
                f"the cache holds {self.batch_size} sequences, got {key_states.shape[0]}; reset it or make a new one."
            )
        added = key_states.shape[-2]
        with torch.no_grad():
            if cache.static:
                positions = torch.arange(added, device=self.device) + self.cumulative_length
                self.keys.index_copy_(2, positions, key_states)
                self.values.index_copy_(2, positions, value_states)
                self.cumulative_length.add_(added)  # last: what does not fit must not count
                return self.keys, self.values
            begin, end = self.cumulative_length, self.cumulative_length + added
            if end > cache.max_len:
                raise UserError(
                    f"the cache holds {cache.max_len} tokens and {end} are needed; regrid it (what dropped layers left "
                    "is free) or give a larger max_len."
                )
            self.keys[:, :, begin:end] = key_states
            self.values[:, :, begin:end] = value_states
            self.cumulative_length = end
            return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self._living().max_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        cache = self._living()
        return (cache.max_len, 0) if cache.static else (self.cumulative_length + query_length, 0)

    def reset(self) -> None:
        """Empty; the memory stays, and the next update may bring another number of sequences."""
        self.is_initialized = False
        self.keys = self.values = None
        self.missed = False
        self._set_length(0)

    def shorten(self, length: int) -> None:
        """Forget what lies beyond this many tokens; a layer that was bypassed may hold less."""
        if self.is_initialized and int(self.cumulative_length) > length:
            self._set_length(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(self.batch_size, device=indices.device)[indices] if self.is_initialized else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order, in place; beside the slab one layer's filled part is needed."""
        if not self.is_initialized:
            return
        cache, length = self._living(), int(self.cumulative_length)
        if len(rows) > cache.max_batch:
            raise UserError(
                f"{len(rows)} sequences do not fit into a cache for {cache.max_batch}; give max_batch or regrid it."
            )
        chosen = [part[:, :, :length].index_select(0, rows.to(part.device)) for part in (self.keys, self.values)]
        self.batch_size = len(rows)
        self.bind()
        self.keys[:, :, :length], self.values[:, :, :length] = chosen

    def forget(self) -> None:
        """Let go of the slab: the layer was dropped."""
        self._cache, self.keys, self.values = (lambda: None), None, None
        self.is_initialized = False

    def _set_length(self, length: int) -> None:
        if isinstance(self.cumulative_length, Tensor):
            self.cumulative_length.fill_(length)
        else:
            self.cumulative_length = length

    def _living(self) -> SlabCache:
        cache = self._cache()
        if cache is None:
            raise RuntimeError("this layer was dropped from its cache; use the layers of the cache as they are now.")
        return cache


class SlabView:
    """K and V of one layer, (batch, heads, tokens, width), until the cache moves."""

    def __init__(self, cache: SlabCache, layer: int, generation: int) -> None:
        self._cache, self._layer, self._generation = cache, layer, generation

    def _part(self, name: str) -> Tensor:
        self._cache.check(self._generation)
        layer = self._cache.layers[self._layer]
        if not layer.is_initialized:
            raise RuntimeError(f"layer {self._layer} of the cache holds nothing yet.")
        return getattr(layer, name)[:, :, : int(layer.get_seq_length())]

    @property
    def keys(self) -> Tensor:
        return self._part("keys")

    @property
    def values(self) -> Tensor:
        return self._part("values")


def _check_sizes(max_len: Any, max_batch: Any) -> None:
    for name, value in (("max_len", max_len), ("max_batch", max_batch)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name} must be a positive whole number, got {value!r}; give the largest you need.")


def _layer_count(config: Any, max_len: int) -> int:
    """How many layers the cache of such a model has; refuses those that keep something else than all K and V."""
    if getattr(config, "is_encoder_decoder", False):
        raise UserError("an encoder-decoder has two caches; SlabCache is for decoder-only models.")
    text = config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", None):
        raise UserError("layers that share keys and values cannot be one slot each; use DynamicCache for this model.")
    kinds = set(getattr(text, "layer_types", None) or [])
    if other := sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"}):
        raise UserError(f"layers of type {other[0]} keep a state that is no K and V; use DynamicCache for this model.")
    return text.num_hidden_layers
