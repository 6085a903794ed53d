"""Compiled layers: the same losses, gates and weights to rounding, with bypass, recomputation and micro-batches."""

import copy
import shutil

import pytest
import torch
from zoo import build

from trsp_fast.config import TRSPConfig
from trsp_fast.engine.session import Session
from trsp_fast.models.compiled import compiled_layers
from trsp_fast.models.families import layer_stack
from trsp_fast.models.recompute import recomputed
from trsp_fast.select import choose_layers
from trsp_fast.transfer import transfer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler here"),
]


def config(compile, **values):
    base = {"num_layers": 2, "data": {"batch": 4}, "select": {"steps_per_round": 2}, "run": {"compile": compile}}
    return TRSPConfig.from_dict({**base, "transfer": {"epochs": 1}, **values})


def test_both_stages_do_what_they_do_without(llama, tokens):
    plain, fast = copy.deepcopy(llama), llama
    one, other = (choose_layers(m, tokens, config(c)) for m, c in ((plain, False), (fast, True)))
    assert one.layers == other.layers
    for a, b in zip(one.history, other.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    a = transfer(plain, tokens, [1, 4], config(False), session=Session(micro_batch=3))
    b = transfer(fast, tokens, [1, 4], config(True), session=Session(micro_batch=3))
    assert b[0]["loss"] == pytest.approx(a[0]["loss"], rel=1e-5)
    # Adam's first steps have the size of the learning rate whatever the gradient's, so rounding shows from then on
    assert [e["loss"] for e in b] == pytest.approx([e["loss"] for e in a], rel=1e-3)
    assert all("forward" not in layer.__dict__ for layer in layer_stack(fast).layers)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_layers_are_compiled_once_for_all_and_may_be_recomputed(name, tokens):
    model = build(name)
    want = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    (gradient,) = torch.autograd.grad(want, model.get_input_embeddings().weight)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with compiled_layers(model), recomputed(model, [0, 1, 5]):
        got = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        (ours,) = torch.autograd.grad(got, model.get_input_embeddings().weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, gradient, rtol=1e-3, atol=1e-6)
    # two forms of attention in qwen3, and each layer kind with and without the recomputation around it
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8
