"""Removal: exact for every family of this release, sharing storage, and refusing what it cannot do."""

import pytest
import torch
from tiny import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    JambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from zoo import GATED_MLP

from trsp_fast.errors import UserError
from trsp_fast.models.removal import remove_layers


def test_parameters_keep_their_storage_and_ties(llama):
    small = remove_layers(llama, [2])
    before = {p.data_ptr() for p in llama.parameters()}
    assert {p.data_ptr() for p in small.parameters()} <= before
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.model.layers[2].mlp.up_proj.weight is llama.model.layers[3].mlp.up_proj.weight
    assert not any(t.is_meta for t in [*small.parameters(), *small.buffers()])


def test_untied_heads_stay_untied():
    model = tiny_llama(tie_word_embeddings=False)
    small = remove_layers(model, [0, 5])
    assert small.lm_head.weight is model.lm_head.weight
    assert small.lm_head.weight.data_ptr() != small.model.embed_tokens.weight.data_ptr()


def test_what_a_model_is_set_to_is_kept():
    model = tiny_llama(dtype="bfloat16").to(torch.bfloat16).train()
    model.generation_config.temperature = 0.5
    model.model.layers[3].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    small = remove_layers(model, [1])
    assert small.dtype == torch.bfloat16
    assert small.config.dtype == torch.bfloat16
    assert small.training
    assert [layer.training for layer in small.model.layers] == [True, True, False, True, True]
    assert small.generation_config.temperature == 0.5
    assert not small.model.embed_tokens.weight.requires_grad
    assert small.config._attn_implementation == model.config._attn_implementation


def test_the_old_model_stays_usable(llama, tokens):
    expected = llama(input_ids=tokens).logits
    remove_layers(llama, [0, 3])
    assert torch.equal(llama(input_ids=tokens).logits, expected)
    assert llama.config.num_hidden_layers == 6


@pytest.mark.parametrize(
    ("layers", "message"), [([6], "does not exist"), ([1, 1], "named 2 times"), ([], "0 of 6"), (range(6), "6 of 6")]
)
def test_bad_layers_are_refused(llama, layers, message):
    with pytest.raises(UserError, match=message):
        remove_layers(llama, layers)


def test_other_architectures_are_refused():
    size = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "vocab_size": 50,
    }
    with pytest.raises(UserError, match="not a causal language model"):
        remove_layers(BertForMaskedLM(BertConfig(**size)), [1])
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=3, vocab_size=50))
    with pytest.raises(UserError, match="encoder-decoder"):
        remove_layers(t5, [1])


def test_a_periodic_hybrid_is_refused_where_the_period_breaks():
    config = JambaConfig(
        **GATED_MLP, use_mamba_kernels=False, num_experts=2, mamba_dt_rank=4, attn_layer_period=4, attn_layer_offset=2
    )
    with pytest.raises(UserError, match="would follow no fixed period any more"):
        remove_layers(AutoModelForCausalLM.from_config(config), [1])


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("peft_config", {"default": object()}, "merge it"), ("_tp_size", 2, "sharded over 2 processes; load it whole")],
)
def test_adapters_and_shards_are_refused(llama, attribute, value, message):
    setattr(llama, attribute, value)
    with pytest.raises(UserError, match=message) as error:
        remove_layers(llama, [1])
    assert str(error.value).endswith(".")
