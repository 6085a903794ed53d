"""SlabCache: the same tokens as transformers' own caches, and layers that leave it without moving a byte."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3nTextConfig,
    LlamaConfig,
    Qwen3NextConfig,
    StaticCache,
    T5Config,
)
from zoo import CORE, GATED_MLP, build, padded

from trsp_fast.errors import UserError
from trsp_fast.models import kv_moves
from trsp_fast.models.gates import bypassed
from trsp_fast.models.kv_cache import SlabCache
from trsp_fast.models.kv_moves import SlotShape
from trsp_fast.models.removal import remove_layers

OPS = torch.ops.trsp_fast
MODES = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
MULTI_QUERY = LlamaConfig(**{**GATED_MLP, "num_key_value_heads": 1})
# Keys wider than values, both made anew per head: multi-head latent attention.
LATENT = DeepseekV3Config(
    vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, first_k_dense_replace=2,
    max_position_embeddings=64, initializer_range=0.2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
EXTRA = {"multi-query": MULTI_QUERY, "latent": LATENT}
MODELS = [*CORE, *EXTRA]
PROMPT = torch.arange(3, 12)[None]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def model_of(name):
    if name not in EXTRA:
        return build(name)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(EXTRA[name]).eval()


def generate(model, cache, tokens=12, **options):
    options = {"input_ids": PROMPT, "do_sample": False} | options
    torch.manual_seed(0)
    return model.generate(
        **options, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


def assert_same(got, want, tolerance=0.0):
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ---- generation


@MODES
@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_and_logits(name, static):
    model = model_of(name)
    want = generate(model, StaticCache(model.config, max_cache_len=32) if static else DynamicCache(config=model.config))
    got = generate(model, SlabCache(model.config, max_len=32, static=static))
    # transformers keeps the window of sliding layers only; here the mask hides what is outside of it
    assert_same(got, want, 1e-5 if static or model.config.to_dict().get("sliding_window") else 0.0)


@MODES
@pytest.mark.parametrize("name", ["llama", "gpt2", "multi-query", "latent"])
def test_a_batch_padded_on_the_left(name, static):
    model = model_of(name)
    want = generate(model, DynamicCache(config=model.config), **padded())
    got = generate(model, SlabCache(model.config, max_len=24, max_batch=3, static=static), **padded())
    assert_same(got, want, 1e-4 if static else 0.0)


def test_sampling():
    model = tiny_llama()
    options = {"do_sample": True, "temperature": 1.5, "top_k": 20}
    want = generate(model, DynamicCache(config=model.config), **options)
    assert_same(generate(model, SlabCache(model.config, max_len=24), **options), want)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_beam_search_reorders_in_place(name):
    model = model_of(name)
    cache = SlabCache(model.config, max_len=24, max_batch=12)
    batch = padded()
    want = generate(model, DynamicCache(config=model.config), num_beams=4, **batch)
    got = generate(model, cache, num_beams=4, **batch)
    assert_same(got, want)
    assert cache.nbytes == cache._slab.untyped_storage().nbytes()
    storage = cache._slab.untyped_storage().data_ptr()
    assert all(layer.keys.untyped_storage().data_ptr() == storage for layer in cache.layers)


def test_assisted_generation_crops():
    model, draft = tiny_llama(), tiny_llama(layers=2)
    want = generate(model, DynamicCache(config=model.config), 20)
    cache = SlabCache(model.config, max_len=40)
    got = model.generate(
        PROMPT, past_key_values=cache, assistant_model=draft, max_new_tokens=20, min_new_tokens=20, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(got, want.sequences)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    model = tiny_llama().to(dtype)
    want = model(PROMPT, past_key_values=DynamicCache(config=model.config)).logits
    cache = SlabCache(model.config, max_len=16)
    assert torch.equal(model(PROMPT, past_key_values=cache).logits, want)
    assert cache.layers[0].keys.dtype == dtype


@pytest.mark.slow
def test_static_decoding_compiles_without_breaks():
    model = tiny_llama(layers=3)
    cache = SlabCache(model.config, max_len=32, static=True)
    model(PROMPT, past_key_values=cache)
    step = torch.compile(lambda token: model(token, past_key_values=cache).logits, fullgraph=True, backend="aot_eager")
    plain = DynamicCache(config=model.config)
    model(PROMPT, past_key_values=plain)
    for token in (5, 6, 7):
        token = torch.tensor([[token]])
        torch.testing.assert_close(step(token), model(token, past_key_values=plain).logits, rtol=0, atol=1e-5)
    assert int(cache.get_seq_length()) == PROMPT.shape[1] + 3


def test_chunked_prefill_and_a_second_conversation():
    model = tiny_llama()
    cache = SlabCache(model.config, max_len=16)
    for _ in range(2):
        model(PROMPT[:, :4], past_key_values=cache)
        logits = model(PROMPT[:, 4:], past_key_values=cache).logits
        want = model(PROMPT, use_cache=False).logits[:, 4:]
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-5)
        cache.reset()
        assert cache.get_seq_length() == 0
    both = model(PROMPT.expand(1, -1), past_key_values=cache).logits
    torch.testing.assert_close(both, model(PROMPT, use_cache=False).logits, rtol=0, atol=1e-5)


# ---- layers that leave


@MODES
@pytest.mark.parametrize("removed", [[0], [1, 4], [5], [0, 1, 2, 4]], ids=str)
def test_cut_in_the_middle_of_generation(removed, static):
    """The proof: bypass, then cut model and cache and go on, past the old capacity, as if nothing had happened."""
    model = tiny_llama(layers=6, max_position_embeddings=128)
    with bypassed(model, removed):
        want = model.generate(PROMPT, max_new_tokens=60, min_new_tokens=60, do_sample=False, use_cache=False)
        cache = SlabCache(model.config, max_len=30, static=static)
        first = model.generate(PROMPT, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, do_sample=False)
    bytes_before, pointer = cache.nbytes, cache._slab.data_ptr()
    small = remove_layers(model, removed)
    cache.drop_layers(removed)
    assert cache.free_bytes == bytes_before * len(removed) // 6
    cache.compact()
    longest = cache.longest()
    assert longest == 30 * 6 // (6 - len(removed))
    cache.regrid(max_len=longest)
    assert (cache.nbytes, cache._slab.data_ptr()) == (bytes_before, pointer)
    room = min(longest, 69) - first.shape[1]
    assert first.shape[1] + room > 30
    got = small.generate(first, past_key_values=cache, max_new_tokens=room, min_new_tokens=room, do_sample=False)
    assert torch.equal(got, want[:, : got.shape[1]])


def filled_cache(layers=5, *, heads=2, batch=2, length=7, max_len=10, max_batch=3, widths=(4, 4), dtype=torch.float32):
    """A cache with random contents, and these contents."""
    config = LlamaConfig(num_hidden_layers=layers)
    cache = SlabCache(config, max_len=max_len, max_batch=max_batch)
    contents = []
    for index in range(layers):
        states = [torch.randn(batch, heads, length, width).to(dtype) for width in widths]
        cache.update(*states, index)
        contents.append(states)
    return cache, contents


def assert_holds(cache, contents):
    assert len(cache.layers) == len(contents)
    for index, (keys, values) in enumerate(contents):
        view = cache.view(index)
        assert torch.equal(view.keys, keys)
        assert torch.equal(view.values, values)


def test_dropping_moves_nothing_and_costs_nothing():
    cache, contents = filled_cache()
    slab = cache._slab.clone()
    slot = cache.nbytes // 5
    assert (cache.free_bytes, cache.capacity) == (0, 30)
    cache.drop_layers([1, 3])
    assert torch.equal(cache._slab, slab)
    assert cache._slab._version == 0 or torch.equal(cache._slab, slab)
    assert cache.free_bytes == 2 * slot
    assert_holds(cache, [contents[i] for i in (0, 2, 4)])
    assert cache.get_seq_length() == 7


geometry = st.fixed_dictionaries(
    {
        "layers": st.integers(2, 6),
        "heads": st.integers(1, 3),
        "batch": st.integers(1, 3),
        "length": st.integers(1, 9),
        "spare_len": st.integers(0, 9),
        "spare_batch": st.integers(0, 2),
        "widths": st.sampled_from([(4, 4), (1, 1), (6, 3), (3, 8)]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    }
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(geometry, st.data())
@pytest.mark.parametrize("implementation", ["C++", "copies"])
def test_contents_survive_every_move(implementation, sizes, data):
    spare = {name: sizes.pop(f"spare_{name}") for name in ("len", "batch")}
    cache, contents = filled_cache(
        **sizes, max_len=sizes["length"] + spare["len"], max_batch=sizes["batch"] + spare["batch"]
    )
    if implementation == "copies":  # what other devices run
        cache._slab = cache._slab.clone()
        cache._rebind()
    gone = data.draw(st.sets(st.integers(0, sizes["layers"] - 1), max_size=sizes["layers"] - 1))
    if gone:
        cache.drop_layers(sorted(gone))
        contents = [c for i, c in enumerate(contents) if i not in gone]
    with implementation_of(implementation):
        if data.draw(st.booleans()):
            cache.compact()
            assert_holds(cache, contents)
        for _ in range(2):
            batch = data.draw(st.integers(sizes["batch"], sizes["batch"] + 3))
            longest = cache.longest(batch)
            if longest < sizes["length"]:
                continue
            cache.regrid(max_len=data.draw(st.integers(sizes["length"], longest)), max_batch=batch)
            assert_holds(cache, contents)
            assert cache.nbytes >= cache.free_bytes >= 0
    more = [torch.randn(sizes["batch"], sizes["heads"], 1, width).to(sizes["dtype"]) for width in sizes["widths"]]
    if cache.max_len > sizes["length"]:
        for index, (keys, values) in enumerate(contents):
            cache.update(*more, index)
            contents[index] = [torch.cat([keys, more[0]], 2), torch.cat([values, more[1]], 2)]
        assert_holds(cache, contents)


class implementation_of:  # noqa: N801 - reads as a function
    """The ops as C++ or, under a dispatch that excludes the CPU's kernels, as the copies of other devices."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        if self.name == "copies":

            class Ops:
                kv_compact_ = staticmethod(kv_moves._compact)
                kv_regrid_ = staticmethod(kv_moves._regrid)

            self.patch.setattr(torch.ops, "trsp_fast", Ops)

    def __exit__(self, *_):
        self.patch.undo()


def test_what_was_freed_becomes_longer_sequences_or_more_of_them():
    cache, contents = filled_cache(layers=6, max_len=10, max_batch=2)
    cache.drop_layers([0, 1, 2])
    assert (cache.longest(), cache.longest(4)) == (20, 10)
    cache.regrid(max_batch=4)
    assert_holds(cache, contents[3:])
    cache.batch_repeat_interleave(2)
    assert_holds(cache, [[t.repeat_interleave(2, 0) for t in pair] for pair in contents[3:]])
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert_holds(cache, [[t.repeat_interleave(2, 0)[[3, 0]] for t in pair] for pair in contents[3:]])


@MODES
def test_layers_dropped_before_anything_is_held(static):
    model = tiny_llama()
    cache = SlabCache(model.config, max_len=32, static=static)
    cache.drop_layers([1, 4])
    small = remove_layers(model, [1, 4])
    assert_same(generate(small, cache), generate(small, DynamicCache(config=small.config)), 1e-5)
    assert cache.free_bytes == 0


@MODES
def test_cropping_with_a_layer_that_was_bypassed_part_of_the_way(static):
    """A layer that holds less than the others loses what lies beyond the new length, and no more."""
    model = tiny_llama()
    cache = SlabCache(model.config, max_len=32, static=static)
    model(PROMPT[:, :4], past_key_values=cache)
    with bypassed(model, [2]):
        model(PROMPT[:, 4:8], past_key_values=cache)
        cache.crop(-3)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [5, 5, 4, 5, 5, 5]
        cache.crop(-2)
        assert [int(layer.get_seq_length()) for layer in cache.layers] == [3] * 6


@MODES
def test_a_bypassed_layer_cannot_come_back_to_the_same_cache(static):
    model = tiny_llama()
    cache = SlabCache(model.config, max_len=32, static=static)
    with bypassed(model, [2]):
        model(PROMPT[:, :4], past_key_values=cache)
    with pytest.raises(UserError, match="was bypassed lacks what the others hold") as error:
        model(PROMPT[:, 4:], past_key_values=cache)
    assert_one_sentence(error)
    cache.reset()
    want = model(PROMPT, use_cache=False).logits
    torch.testing.assert_close(model(PROMPT, past_key_values=cache).logits, want, rtol=0, atol=1e-5)


def test_reset_keeps_what_a_captured_graph_counts_with():
    cache = SlabCache(tiny_llama().config, max_len=32, static=True)
    tiny_llama()(PROMPT, past_key_values=cache)
    counters = [layer.cumulative_length for layer in cache.layers]
    cache.reset()
    assert all(layer.cumulative_length is counter for layer, counter in zip(cache.layers, counters, strict=True))
    assert not any(counters)


def test_views_and_graphs_of_before_a_move_raise():
    cache, _ = filled_cache()
    view, replay = cache.view(1), cache.guarded(lambda: "replayed")
    assert replay() == "replayed"
    layer = cache.layers[0]
    cache.drop_layers([0])
    with pytest.raises(RuntimeError, match=r"has moved since \(generation 0, now 1\)"):
        _ = view.keys
    with pytest.raises(RuntimeError, match="capture the graph or take the view again"):
        replay()
    with pytest.raises(RuntimeError, match="was dropped from its cache"):
        layer.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    view = cache.view(0)
    cache.compact()
    with pytest.raises(RuntimeError, match="has moved"):
        _ = view.values
    generation = cache.generation
    cache.compact()
    assert cache.generation == generation  # nothing moved


def test_to_and_from_other_caches():
    model = tiny_llama()
    dynamic, static = DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=20)
    for cache in (dynamic, static):
        model(PROMPT, past_key_values=cache)
    want = model(torch.tensor([[5]]), past_key_values=copy.deepcopy(dynamic)).logits
    for cache in (dynamic, static, SlabCache.from_cache(dynamic)):
        slab = SlabCache.from_cache(cache, max_len=12)
        assert slab.nbytes == 6 * 2 * 2 * 12 * 8 * 4
        for again in (slab.to_cache(), slab):
            got = model(torch.tensor([[5]]), past_key_values=again).logits
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_slab_goes_with_the_cache():
    cache, _ = filled_cache()
    slab = weakref.ref(cache._slab)
    gc.disable()
    try:
        del cache
        assert slab() is None
    finally:
        gc.enable()


def test_a_deep_copy_is_a_cache_of_its_own():
    cache, contents = filled_cache()
    other = copy.deepcopy(cache)
    assert other._slab.data_ptr() != cache._slab.data_ptr()
    assert other.layers[0].keys.untyped_storage().data_ptr() == other._slab.untyped_storage().data_ptr()
    cache._slab.fill_(7)
    assert_holds(other, contents)


# ---- what is refused


def assert_one_sentence(error):
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


CONFIGS = {
    "shared": (Gemma3nTextConfig(num_hidden_layers=10, num_kv_shared_layers=4), "share keys and values"),
    "linear": (Qwen3NextConfig(num_hidden_layers=4), "linear_attention keep a state"),
    "encoder-decoder": (T5Config(), "encoder-decoder has two caches"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_models_it_is_not_for(case):
    config, message = CONFIGS[case]
    with pytest.raises(UserError, match=message) as error:
        SlabCache(config, max_len=8)
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda cache: cache.drop_layers([5]), "5"),
        (lambda cache: cache.drop_layers([1, 1]), "1"),
        (lambda cache: cache.drop_layers(range(5)), "layer"),
        (lambda cache: cache.regrid(max_len=11), "at most 3 x 10 do"),
        (lambda cache: cache.regrid(max_len=0), "must be a positive whole number"),
        (lambda cache: cache.regrid(max_len=9.5), "must be a positive whole number"),
        (lambda cache: cache.regrid(max_len=6), "holds 2 sequences of 7 tokens, more than the 3 x 6"),
        (lambda cache: cache.regrid(max_batch=1), "more than the 1 x 10"),
        (lambda cache: cache.update(torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4), 0), "holds 10 tokens and 11"),
        (lambda cache: cache.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0), "holds 2 sequences, got 1"),
        (lambda cache: cache.batch_repeat_interleave(2), "4 sequences do not fit into a cache for 3"),
    ],
)
def test_what_does_not_fit_is_one_sentence(act, message):
    cache, contents = filled_cache()
    with pytest.raises(UserError, match=message) as error:
        act(cache)
    assert_one_sentence(error)
    assert_holds(cache, contents)


@pytest.mark.parametrize("values", [{"max_len": 0}, {"max_len": 8, "max_batch": -1}, {"max_len": 2.5}])
def test_sizes_must_be_positive(values):
    with pytest.raises(UserError, match="must be a positive whole number") as error:
        SlabCache(LlamaConfig(), **values)
    assert_one_sentence(error)


def test_layers_of_different_widths_are_refused():
    cache = SlabCache(LlamaConfig(num_hidden_layers=2), max_len=8)
    cache.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)
    with pytest.raises(UserError, match="keys and values differ"):
        cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 1)


def test_a_prompt_of_several_sequences_needs_room():
    with pytest.raises(UserError, match="3 sequences do not fit into a cache for 1"):
        generate(tiny_llama(), SlabCache(tiny_llama().config, max_len=24), **padded())


def test_gradients_are_refused_rather_than_lost():
    with torch.enable_grad(), pytest.raises(UserError, match="keeps no gradients; run the model under") as error:
        tiny_llama()(PROMPT, past_key_values=SlabCache(tiny_llama().config, max_len=16))
    assert_one_sentence(error)


@MODES
def test_inference_mode_and_back(static):
    model = tiny_llama()
    with torch.inference_mode():
        cache = SlabCache(model.config, max_len=16, static=static)
    with torch.inference_mode():
        model(PROMPT[:, :4], past_key_values=cache)
    logits = model(PROMPT[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(PROMPT, use_cache=False).logits[:, 4:], rtol=0, atol=1e-5)


def test_other_kinds_of_cache_layers_are_refused():
    model = build("mistral")
    cache = DynamicCache(config=model.config)
    model(PROMPT, past_key_values=cache)
    with pytest.raises(UserError, match="DynamicSlidingWindowLayer cannot be one slab"):
        SlabCache.from_cache(cache)
    with pytest.raises(UserError, match="hold no tokens"):
        SlabCache.from_cache(DynamicCache())
    with pytest.raises(UserError, match="EncoderDecoderCache cannot be one slab"):
        SlabCache.from_cache(EncoderDecoderCache(DynamicCache(), DynamicCache()))


@MODES
def test_tokens_that_do_not_fit_are_not_counted(static):
    model = tiny_llama()
    cache = SlabCache(model.config, max_len=10, static=static)
    model(PROMPT, past_key_values=cache)
    with pytest.raises((UserError, IndexError, RuntimeError)):
        model(PROMPT, past_key_values=cache)
    assert {int(layer.get_seq_length()) for layer in cache.layers} == {PROMPT.shape[1]}


# ---- the ops


SLAB = [3, 2, 5, 4, 4]  # batch, heads, length, widths: 240 elements a slot


def test_opcheck():
    slab, scratch = torch.randn(960), torch.empty(240)
    torch.library.opcheck(OPS.kv_compact_.default, (slab, [0, 2, 3], SLAB, [2, 4]))
    torch.library.opcheck(OPS.kv_regrid_.default, (slab, scratch, 2, SLAB, [3, 2, 10, 4, 4], [2, 4]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: OPS.kv_compact_(s, [2, 1], SLAB, [2, 4]), "must ascend"),
        (lambda s: OPS.kv_compact_(s, [0, 0], SLAB, [2, 4]), "must ascend"),
        (lambda s: OPS.kv_compact_(s, [-1], SLAB, [2, 4]), "must ascend"),
        (lambda s: OPS.kv_compact_(s, [0, 4], SLAB, [2, 4]), "5 slots of 960 bytes do not fit into a slab of 3840"),
        (lambda s: OPS.kv_compact_(s, [1], SLAB, [4, 4]), "filled must be"),
        (lambda s: OPS.kv_compact_(s, [1], SLAB, [3, 6]), "filled must be"),
        (lambda s: OPS.kv_compact_(s, [1], SLAB[:4], [3, 5]), "sizes must be"),
        (lambda s: OPS.kv_compact_(s, [1], [3, 2, -5, 4, 4], [0, 0]), "sizes must be sizes"),
        (lambda s: OPS.kv_compact_(s, [1], [2**32, 2**32, 1, 1, 1], [1, 1]), "product is an address"),
        (lambda s: OPS.kv_compact_(s.view(2, -1), [1], SLAB, [3, 5]), "one contiguous dimension"),
        (lambda s: OPS.kv_compact_(s[::2], [1], SLAB, [3, 5]), "one contiguous dimension"),
        (lambda s: OPS.kv_regrid_(s, s[:10].clone(), 2, SLAB, [3, 2, 9, 4, 4], [2, 4]), "scratch must hold 512 bytes"),
        (lambda s: OPS.kv_regrid_(s, s.clone(), 2, SLAB, [3, 2, 11, 4, 4], [2, 4]), "2 slots of 2112 bytes"),
        (lambda s: OPS.kv_regrid_(s, s.clone(), 2, SLAB, [3, 1, 9, 4, 4], [2, 4]), "keeps its heads"),
        (lambda s: OPS.kv_regrid_(s, s.clone(), 2, SLAB, [3, 2, 3, 4, 4], [2, 4]), "filled must be"),
        (lambda s: OPS.kv_regrid_(s, s.clone(), -1, SLAB, SLAB, [2, 4]), "must not be negative"),
    ],
)  # fmt: skip
def test_the_ops_check_what_they_are_given(call, message):
    slab = torch.randn(960)
    before = slab.clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(slab)
    assert torch.equal(slab, before)


def test_moves_do_not_depend_on_the_number_of_threads():
    shape = [2, 4, 2048, 64, 64]
    slab = torch.randn(4 * 2 * 2 * 4 * 2048 * 64)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            moved = slab.clone()
            OPS.kv_compact_(moved, [1, 3], shape, [2, 1500])
            OPS.kv_regrid_(moved, torch.empty(slab.numel()), 2, shape, [3, 4, 2500, 64, 64], [2, 1500])
            results.append(moved)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (3, 5), (1, 2)], ids=str)
def test_moves_on_a_gpu_equal_those_on_the_cpu(dtype, widths):
    """By the CUDA kernel where one was built, by copies elsewhere; 16, 4 and 2 bytes at a time."""
    shape, after = [2, 3, 50, *widths], [2, 3, 63, *widths]
    slab = torch.randn(4 * 2 * 3 * 63 * sum(widths)).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        moved = slab.clone().to(device)
        OPS.kv_compact_(moved, [0, 2, 3], shape, [2, 41])
        OPS.kv_regrid_(moved, torch.empty_like(moved), 3, shape, after, [2, 41])
        cache = [part[:, :, :41] for slot in range(3) for part in kv_moves.slot_views(moved, slot, SlotShape(*after))]
        results.append([part.cpu() for part in cache])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert torch.equal(on_cpu, on_gpu)


@needs_gpu
def test_a_captured_step_replays_until_the_cache_moves():
    model = tiny_llama().cuda()
    cache = SlabCache(model.config, max_len=32, static=True)
    plain = DynamicCache(config=model.config)
    for each in (cache, plain):
        model(PROMPT.cuda(), past_key_values=each)
    token = torch.tensor([[5]], device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        model(token, past_key_values=cache)
        cache.crop(-1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            logits = model(token, past_key_values=cache).logits
    torch.cuda.synchronize()
    replay = cache.guarded(graph.replay)
    for value in (5, 6, 7):
        token.fill_(value)
        replay()
        want = model(token.clone(), past_key_values=plain).logits
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-3)
    cache.drop_layers([1])
    with pytest.raises(RuntimeError, match="has moved since"):
        replay()
