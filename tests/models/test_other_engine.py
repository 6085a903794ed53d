"""A pruned checkpoint runs in an engine that is not transformers: CTranslate2, with its own converter and kernels."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from zoo import GATED_MLP

import trsp_fast
from trsp_fast.models.disk_removal import remove_layers_on_disk

ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
DEMO = Path(trsp_fast.__file__).parent / "demo_model"


@pytest.fixture(params=["demo model", "grouped heads, rope_theta 500000"])
def checkpoint(request, tmp_path):
    """A Llama with a tokenizer: the built-in model, and a random one of the shape of Llama 3."""
    if request.param == "demo model":
        return DEMO
    torch.manual_seed(0)
    fields = {**GATED_MLP, "vocab_size": 2048, "hidden_size": 64, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**fields, rope_theta=500000.0, tie_word_embeddings=False))
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    model.save_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path / "source")
    return tmp_path / "source"


def test_logits_and_greedy_tokens_are_those_of_transformers(checkpoint, tmp_path):
    remove_layers_on_disk(checkpoint, [1, 4, 6], tmp_path / "pruned")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "pruned")).convert(str(tmp_path / "converted"))
    engine = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    ids = tokenizer("import os\n\ndef main():\n").input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits
        greedy = model.generate(torch.tensor([ids]), max_new_tokens=20, min_new_tokens=20, do_sample=False)[0]
    got = torch.from_numpy(np.array(engine.forward_batch([tokens])))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.std()))
    generated = engine.generate_batch([tokens], min_length=20, max_length=20, sampling_topk=1, end_token=[],
                                      include_prompt_in_result=False)  # fmt: skip
    assert generated[0].sequences_ids[0] == greedy[len(ids) :].tolist()
