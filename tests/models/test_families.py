"""Every family of the zoo: layers come out exactly or not at all, in memory and on disk, gated, bypassed and padded."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn
from zoo import CORE, DEFAULT_SETS, LAYERS, SETS, ZOO, build, padded

from trsp_fast.errors import CheckFailed, UserError
from trsp_fast.models.disk_removal import remove_layers_on_disk
from trsp_fast.models.families import _FIELDS, disk_obstacle, fixed_layers, layer_stack, slice_config, sliced_tensors
from trsp_fast.models.gates import LayerGates, bypassed
from trsp_fast.models.removal import remove_layers
from trsp_fast.models.verify import require, verify_checkpoint, verify_removal

ROOT = Path(__file__).parents[2]
# Exactness is promised for these; the others are refused, and the table says with which sentence.
REFUSED = {"rwkv": "kept in a form of its own"}
EXACT = [name for name in ZOO if name not in REFUSED]
FAMILIES = [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in EXACT]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def made(name):
    """A model of the family; skips where this transformers does not have it yet."""
    try:
        return build(name)
    except AttributeError as error:
        pytest.skip(f"this transformers has no {error.name or name}")


def test_there_are_enough_of_them():
    assert len(EXACT) >= 30
    assert set(CORE) <= set(EXACT)


@pytest.mark.parametrize("number", range(3), ids=["first", "scattered", "last"])
def test_exact_in_memory_and_on_disk(family, number, tmp_path):
    model = made(family)
    removed = SETS.get(family, DEFAULT_SETS)[number]
    small = remove_layers(model, removed)
    checks = verify_removal(model, small, removed)
    small.save_pretrained(tmp_path / "memory")
    checks += verify_checkpoint(small, tmp_path / "memory")[0]
    require(checks)
    assert len(layer_stack(small)) == LAYERS - len(removed)
    with torch.no_grad(), bypassed(model, removed):
        want = model(**padded(), use_cache=False).logits
    with torch.no_grad():
        got = small(**padded(), use_cache=False).logits
    kept = padded()["attention_mask"].bool()
    assert torch.equal(got[kept], want[kept])
    if not sliced_tensors(model.config.to_dict()):
        pointers = {p.data_ptr() for p in model.parameters()}
        assert all(p.data_ptr() in pointers for p in small.parameters())
        model.save_pretrained(tmp_path / "src")
        saved = json.loads((tmp_path / "src" / "config.json").read_text())
        if disk_obstacle(saved):  # an older transformers may write less
            pytest.skip(f"not on disk: {disk_obstacle(saved)}")
        remove_layers_on_disk(tmp_path / "src", removed, tmp_path / "disk")
        require(verify_checkpoint(small, tmp_path / "disk")[0])


class HandGates:
    """Gates by hooks as one would write them by hand, without our kernels."""

    def __init__(self, model, mode):
        self.values = nn.Parameter(torch.linspace(0.6, 1.3, LAYERS))
        self.handles = [
            layer.register_forward_hook(self.hook(index, mode), with_kwargs=True)
            for index, layer in enumerate(layer_stack(model).layers)
        ]

    def hook(self, index, mode):
        def weigh(_module, args, kwargs, output):
            x = args[0] if args else kwargs["hidden_states"]
            out = output[0] if isinstance(output, tuple) else output
            y = self.values[index] * out
            if mode == "residual":
                y = y + (1 - self.values[index]) * x
            return (y, *output[1:]) if isinstance(output, tuple) else y

        return weigh

    def remove(self):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("mode", ["residual", "output"])
def test_a_gated_step_has_the_gradients_of_a_loop_by_hand(family, mode):
    model = made(family)
    batch = {**padded(), "labels": padded()["input_ids"], "use_cache": False}
    if family == "gemma3n":  # the padding token's embedding is 0, and the root in its own normalisation NaN there
        batch = {name: value.clamp(min=1) if name != "use_cache" else value for name, value in batch.items()}
    by_hand = HandGates(model, mode)
    loss = model(**batch).loss
    (want,) = torch.autograd.grad(loss, by_hand.values)
    by_hand.remove()
    with LayerGates(model, mode=mode) as gates:
        with torch.no_grad():
            gates.values.copy_(by_hand.values)
        ours = model(**batch).loss
        ours.backward()
        got = gates.values.grad
        assert len(gates.norms()) == LAYERS
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4 * float(want.abs().max()) + 2e-6)
    assert want.count_nonzero() >= LAYERS - 1


def test_gates_of_one_change_nothing(family):
    model = made(family)
    with torch.no_grad():
        want = model(**padded(), use_cache=False).logits
        for mode in ("residual", "output"):
            with LayerGates(model, mode=mode):
                assert torch.equal(model(**padded(), use_cache=False).logits, want)


def test_every_layer_bypassed_generates_alike_with_and_without_a_cache(family):
    """Or is refused with a sentence: a cache may take its length from a layer that is not there."""
    model = made(family)
    tokens = torch.arange(3, 12)[None]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    options["return_dict_in_generate"] = True
    fixed = fixed_layers(model.config.to_dict())
    for layer in range(LAYERS):
        if layer in fixed:
            continue
        with bypassed(model, [layer]):
            uncached = model.generate(tokens, use_cache=False, **options)
            try:
                cached = model.generate(tokens, use_cache=True, **options)
            except UserError as error:
                assert "KV cache reads its length there" in str(error)  # noqa: PT017 - the refusal is one of two right outcomes
                continue
        assert torch.equal(cached.sequences, uncached.sequences), layer
        for a, b in zip(cached.logits, uncached.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3 * float(b.std()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXACT if name not in CORE])
def test_every_field_that_transformers_would_derive_is_asked_for(name, tmp_path):
    """Each list per layer and each field of _FIELDS taken out of config.json: cut exactly all the same, or refused."""
    model = made(name)
    model.save_pretrained(tmp_path / "src")
    saved = json.loads((tmp_path / "src" / "config.json").read_text())
    if disk_obstacle(saved):
        pytest.skip(f"not on disk: {disk_obstacle(saved)}")
    inner = saved.get("text_config", saved)
    special = [k for k, v in inner.items() if k in _FIELDS or (isinstance(v, list) and len(v) == LAYERS)]
    removed = SETS.get(name, DEFAULT_SETS)[0]
    for key in special:
        less = {k: v for k, v in inner.items() if k != key}
        less = {**saved, "text_config": less} if "text_config" in saved else less
        if disk_obstacle(less):
            continue
        (tmp_path / "src" / "config.json").write_text(json.dumps(less))
        try:
            source, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "src", output_loading_info=True)
        except Exception:  # transformers itself cannot do without it
            continue
        if info["missing_keys"] or info["unexpected_keys"]:  # another model, which these weights are not of
            continue
        remove_layers_on_disk(tmp_path / "src", removed, tmp_path / key)
        require(verify_checkpoint(remove_layers(source, removed), tmp_path / key)[0])
        got = hf.AutoModelForCausalLM.from_pretrained(tmp_path / key)
        with torch.no_grad(), bypassed(source, removed):
            want = source(torch.arange(3, 20)[None], use_cache=False).logits
        with torch.no_grad():
            assert torch.equal(got(torch.arange(3, 20)[None], use_cache=False).logits, want), key


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_with_a_sentence(name):
    model = made(name)
    with pytest.raises(UserError, match=REFUSED[name]) as error:
        remove_layers(model, [1])
    assert str(error.value).endswith(".")


# ---- negative controls: what a patch instead of a rebuild gets wrong, the proof must see


def naive_patch(model, removed):
    """What layer pruners do: a shorter ModuleList, the count in the configuration, layer indices renumbered."""
    stack = layer_stack(model)
    kept = [layer for index, layer in enumerate(stack.layers) if index not in removed]
    owner, _, name = stack.path.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.ModuleList(kept))
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    model.config.num_hidden_layers = len(kept)
    return model


# Families whose configuration has more per layer than a count.
TRAPPED = [
    "qwen3", "smollm3", "deepseek-v3", "glm4-moe", "gemma2", "gemma3", "cohere2", "olmo3", "gpt-oss", "gemma3n",
    "gemma4", "jamba", "qwen3-moe", "llama4", "bamba", "recurrent-gemma", "lfm2", "qwen3-next",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAPPED)
def test_the_proof_sees_a_naive_patch(name, tmp_path):
    removed = DEFAULT_SETS[1]
    model, patched = made(name), naive_patch(made(name), removed)
    try:
        checks = verify_removal(model, patched, removed)
        patched.save_pretrained(tmp_path)
        checks += verify_checkpoint(patched, tmp_path)[0]
    except (CheckFailed, AssertionError):
        raise
    except Exception:  # transformers refuses the patched model in many ways, and that is as good
        return
    assert [check.name for check in checks if not check.passed], "the proof holds for a model that is wrong"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "phi"])
def test_the_proof_accepts_a_patch_that_is_right(name):
    """Where a count is all there is, the patch gives the same model, and the proof does not mind how it was made."""
    removed = DEFAULT_SETS[1]
    require(verify_removal(made(name), naive_patch(made(name), removed), removed))


# ---- the rules by themselves


def config(**fields):
    return {"model_type": "x", "num_hidden_layers": 8, **fields}


@pytest.mark.parametrize(
    ("fields", "kept", "want"),
    [
        ({"layer_types": list("abcdefgh")}, [0, 3, 7], {"layer_types": ["a", "d", "h"]}),
        ({"bad_words_ids": list(range(8))}, [0, 3, 7], {"bad_words_ids": list(range(8))}),
        ({"first_k_dense_replace": 3}, [0, 2, 5, 6], {"first_k_dense_replace": 2}),
        ({"attn_layer_indices": [1, 4]}, [0, 4, 5], {"attn_layer_indices": [1]}),
        ({"moe_layers": list(range(8))}, [0, 4, 5], {"moe_layers": [0, 1, 2]}),
        ({"block_types": ["r", "r", "a"]}, [1, 2, 3, 6], {"block_types": ["r", "a", "r", "r"]}),
        ({"decoder_sparse_step": 1, "mlp_only_layers": []}, [1, 2], {"decoder_sparse_step": 1, "mlp_only_layers": []}),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [2, 5]}, [1, 2, 6], {"mlp_only_layers": [1]}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [0, 1, 3, 5],
         {"decoder_sparse_step": 1, "mlp_only_layers": [0, 2]}),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, [1, 2, 3, 4, 5, 6, 7],
         {"attn_layer_period": 4, "attn_layer_offset": 1}),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, [0, 1, 2, 3], {"attn_layer_offset": 2}),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, [2, 4, 6], {"attn_layer_period": 2, "attn_layer_offset": 0}),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, [0, 1, 3], {"attn_layer_period": 4, "attn_layer_offset": 3}),
        ({"num_kv_shared_layers": 2, "layer_types": ["a", "b", "a", "b", "a", "b", "a", "b"]}, [0, 4, 5, 6],
         {"num_kv_shared_layers": 1, "layer_types": ["a", "a", "b", "a"]}),
    ],
)  # fmt: skip
def test_fields_that_name_layers(fields, kept, want):
    sliced = slice_config(config(**fields), kept)
    assert sliced["num_hidden_layers"] == len(kept)
    for key, value in want.items():
        assert sliced[key] == value, key


@pytest.mark.parametrize(
    ("fields", "kept", "message"),
    [
        ({"attn_layer_period": 2, "attn_layer_offset": 0}, [0, 2, 3, 4, 5, 6, 7], "attn layers would follow no fixed"),
        ({"num_kv_shared_layers": 2, "layer_types": ["a", "b"] * 4}, [0, 1, 2, 3, 4, 6, 7], "layer 5 makes the keys"),
        ({"model_type": "gemma4_text", "layer_types": [*["s"] * 7, "full_attention"]}, [0, 1, 2], "keep layer 7"),
    ],
)
def test_sets_that_a_configuration_cannot_say(fields, kept, message):
    with pytest.raises(UserError, match=message) as error:
        slice_config(config(**fields), kept)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_fixed_layers_have_reasons():
    values = config(num_kv_shared_layers=2, layer_types=["a", "b"] * 4)
    assert set(fixed_layers(values)) == {4, 5}
    assert "later layers share" in fixed_layers(values)[4]
    assert fixed_layers(config()) == {}
    nested = {"text_config": values, "model_type": "outer"}
    assert set(fixed_layers(nested)) == {4, 5}


# ---- the paper's models at full shape, without weights

PAPER = {
    # name -> configuration class, fields, parameters of one layer, of everything else
    "LLaMA2-7B": ("LlamaConfig", {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                                  "num_attention_heads": 32, "vocab_size": 32000},
                  4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, 2 * 32000 * 4096 + 4096),
    "LLaMA2-13B": ("LlamaConfig", {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                                   "num_attention_heads": 40, "vocab_size": 32000},
                   4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120, 2 * 32000 * 5120 + 5120),
    "LLaMA3-8B": ("LlamaConfig", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                  "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
                  2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096, 2 * 128256 * 4096 + 4096),
    "OPT-2.7B": ("OPTConfig", {"hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
                               "num_attention_heads": 32, "vocab_size": 50272, "word_embed_proj_dim": 2560},
                 4 * (2560**2 + 2560) + 2 * 2560 * 10240 + 10240 + 2560 + 4 * 2560,
                 50272 * 2560 + 2050 * 2560 + 2 * 2560),
    "OPT-13B": ("OPTConfig", {"hidden_size": 5120, "ffn_dim": 20480, "num_hidden_layers": 40,
                              "num_attention_heads": 40, "vocab_size": 50272, "word_embed_proj_dim": 5120},
                4 * (5120**2 + 5120) + 2 * 5120 * 20480 + 20480 + 5120 + 4 * 5120,
                50272 * 5120 + 2050 * 5120 + 2 * 5120),
    "Phi-2": ("PhiConfig", {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
                            "num_attention_heads": 32, "vocab_size": 51200},
              4 * (2560**2 + 2560) + 2 * 2560 * 10240 + 10240 + 2560 + 2 * 2560,
              2 * 51200 * 2560 + 51200 + 2 * 2560),
}  # fmt: skip


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_at_full_shape(name, share):
    import transformers

    kind, fields, per_layer, rest = PAPER[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields))
    count = fields["num_hidden_layers"]
    assert sum(p.numel() for p in model.parameters()) == count * per_layer + rest
    removed = range(1, 1 + int(count * share))
    small = remove_layers(model, removed)
    assert sum(p.numel() for p in small.parameters()) == (count - len(removed)) * per_layer + rest
    assert small.config.num_hidden_layers == count - len(removed)


# ---- docs/families.md


def test_the_table_of_families_is_in_step():
    """`make families` writes it from the run of these tests; here it must name the same families."""
    text = (ROOT / "docs" / "families.md").read_text()
    cells = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    rows = {row[1].strip(): row[2].strip() for row in cells[1:]}
    assert rows == {name: "exact" for name in EXACT} | dict.fromkeys(REFUSED, "refused")


HEAD = """# Families

Written by `make families` from a run of `tests/models/test_families.py` on tiny random models, transformers {version}:
which families lose layers exactly (bypassed logits = pruned logits with a difference of 0.0, cached = uncached
generation, reload without a missing or unexpected key, in memory and on disk, gates against a loop by hand, every layer
bypassed) and which are refused. A family that is not here is rebuilt by the same rule and refused where the proof does
not hold.

| family | verdict | class | removed in the proof, of 8 | layers that cannot go by themselves |
|---|---|---|---|---|
"""


@pytest.fixture(scope="session", autouse=True)
def families_table(request):
    """Writes the table when TRSP_FAST_FAMILIES names a file, from what passed in this run."""
    yield
    if not os.environ.get("TRSP_FAST_FAMILIES"):
        return
    import transformers

    failed = {item for item in request.session.items if getattr(item, "failed_here", False)}
    lines = []
    for name in ZOO:
        own = [item for item in request.session.items if f"[{name}-" in item.name or item.name.endswith(f"[{name}]")]
        assert own, f"no test of {name} was run"
        model = made(name)
        if name in REFUSED:
            verdict, sets, reasons = "refused", "", f"its state is {REFUSED[name]}"
        else:
            verdict = "failed" if failed & set(own) else "exact"
            sets = "; ".join(", ".join(map(str, removed)) for removed in SETS.get(name, DEFAULT_SETS))
            fixed = fixed_layers(model.config.to_dict())
            reasons = " ".join(f"{layer}: {reason}" for layer, reason in fixed.items())
        lines.append(f"| {name} | {verdict} | `{type(model).__name__}` | {sets} | {reasons} |")
    text = HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n"
    Path(os.environ["TRSP_FAST_FAMILIES"]).write_text(text)
