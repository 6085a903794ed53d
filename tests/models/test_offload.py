"""Layers streamed from host memory: the same bits, what is fetched when, how much is there at once, and no trace."""

import copy
import gc
import sys
import weakref

import pytest
import torch
from tiny import tiny_llama
from transformers.models.llama.modeling_llama import LlamaMLP
from zoo import CORE, ZOO, build

import trsp_fast as trsp
from trsp_fast import plan as plan_module
from trsp_fast import pruner
from trsp_fast.cli import common
from trsp_fast.config import TRSPConfig
from trsp_fast.engine.memory import peak_bytes
from trsp_fast.errors import UserError
from trsp_fast.models import offload
from trsp_fast.models.families import layer_stack
from trsp_fast.models.gates import LayerGates, bypassed
from trsp_fast.models.offload import StreamedForward, WeightStream, resident, streamed_bytes, streamed_layers
from trsp_fast.models.prefix import PrefixStates
from trsp_fast.models.recompute import recomputed
from trsp_fast.report import speed
from trsp_fast.run.events import Events
from trsp_fast.select import choose_layers

CPU = torch.device("cpu")
transfer_module = sys.modules["trsp_fast.transfer"]  # the package has a function of this name


@pytest.fixture
def frozen(llama):
    return llama.requires_grad_(False)


@pytest.fixture(autouse=True)
def short_stopwatch(monkeypatch):
    """The speed of these models is nobody's business, but is measured by passes that must be streamed too."""
    for name, value in {"NEW_TOKENS": 2, "BATCH": 1, "REPEATS": 1}.items():
        monkeypatch.setattr(speed, name, value)


@pytest.fixture
def fetches(monkeypatch):
    """The layers that are fetched from now on, one entry a fetch."""
    log, fetch = [], WeightStream._fetch

    def logged(stream, index):
        log.append(index)
        return fetch(stream, index)

    monkeypatch.setattr(WeightStream, "_fetch", logged)
    return log


def taken(fetches):
    entries = list(fetches)
    fetches.clear()
    return entries


def step(model, gates, tokens, penalty=0.0):
    gates.values.grad = None
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    distances = gates.distances("l2")
    (loss + penalty * sum(distances.values())).backward()
    return loss.detach(), gates.values.grad.clone(), torch.stack(list(distances.values())).detach()


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "family",
    [
        name if name in {*CORE, "gemma3n", "gpt-neo"} else pytest.param(name, marks=pytest.mark.slow)
        for name in ZOO
        if name != "rwkv"
    ],
)
def test_losses_gates_and_distances_are_those_without(family):
    """Shared keys and values, tied heads, buffers in layers, experts: on fetched copies to the bit."""
    try:
        model = build(family).requires_grad_(False)
    except AttributeError as error:
        pytest.skip(f"this transformers has no {error.name or family}")
    tokens = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(1))
    with LayerGates(model) as gates:
        gates.values.data.copy_(torch.linspace(0.6, 1.3, len(gates.values)))
        want = step(model, gates, tokens, penalty=0.1)
    with streamed_layers(model, CPU), LayerGates(model) as gates:
        gates.values.data.copy_(torch.linspace(0.6, 1.3, len(gates.values)))
        assert_same(step(model, gates, tokens, penalty=0.1), want)


def test_layers_compute_on_what_was_fetched(frozen, tokens, monkeypatch):
    """Not on the weights on the host: zeros that are fetched leave the embeddings alone."""
    with torch.no_grad(), bypassed(frozen, range(6)):
        want = frozen(input_ids=tokens, use_cache=False).logits
    fetch = WeightStream._fetch

    def zeros(stream, index):
        fetched = fetch(stream, index)
        for weight in fetched.weights.values():
            weight.zero_()
        return fetched

    monkeypatch.setattr(WeightStream, "_fetch", zeros)
    with torch.no_grad(), streamed_layers(frozen, CPU):
        assert torch.equal(frozen(input_ids=tokens).logits, want)


def test_up_in_the_forward_pass_and_down_in_the_backward_pass(frozen, tokens, fetches):
    """The top layer's weights serve both; the lowest gated layer's own computation has no backward pass."""
    with streamed_layers(frozen, CPU):
        with LayerGates(frozen) as gates:
            step(frozen, gates, tokens)
            assert taken(fetches) == [0, 1, 2, 3, 4, 5, 4, 3, 2, 1]
            gates.bypass([0, 2, 5])
            step(frozen, gates, tokens)
            assert taken(fetches) == [1, 3, 4, 3]
        with LayerGates(frozen, layers=[3, 4, 5]) as gates:
            step(frozen, gates, tokens)
            assert taken(fetches) == [0, 1, 2, 3, 4, 5, 4]
        with torch.no_grad():
            for _ in range(2):
                frozen(input_ids=tokens)
                assert taken(fetches) == [0, 1, 2, 3, 4, 5]
            with bypassed(frozen, [3]):
                frozen(input_ids=tokens)
                assert taken(fetches) == [0, 1, 2, 4, 5]


def test_the_next_layer_sets_out_before_this_one_computes(frozen, tokens, fetches):
    seen = []
    for index, layer in enumerate(frozen.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: seen.append((index, fetches[-1])))
    with streamed_layers(frozen, CPU), LayerGates(frozen) as gates:
        step(frozen, gates, tokens)
    up, down = seen[:6], seen[6:]
    assert up == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]
    assert down == [(5, 4), (4, 3), (3, 2), (2, 1), (1, 1)]


def test_two_layers_weights_at_a_time_and_none_afterwards(frozen, tokens, monkeypatch):
    """Counted through weak references, without the help of the garbage collector."""
    alive, most, fetch = weakref.WeakSet(), [], WeightStream._fetch

    def watched(stream, index):
        fetched = fetch(stream, index)
        alive.update(weight.untyped_storage() for weight in fetched.weights.values())
        most.append(sum(storage.nbytes() for storage in alive))
        return fetched

    monkeypatch.setattr(WeightStream, "_fetch", watched)
    a_layer = sum(p.nbytes for p in frozen.model.layers[0].parameters())
    gc.disable()
    try:
        with streamed_layers(frozen, CPU), LayerGates(frozen) as gates:
            assert streamed_bytes(frozen) == 2 * a_layer
            for _ in range(2):
                step(frozen, gates, tokens)
                assert len(alive) == 0
            frozen(input_ids=tokens)  # its backward pass would begin with the top layer, which gives way
            with torch.no_grad():
                frozen(input_ids=tokens)
                assert len(alive) == 0
                handle = frozen.model.layers[2].mlp.register_forward_hook(stop)
                with pytest.raises(RuntimeError, match="stop"):
                    frozen(input_ids=tokens)
                handle.remove()
        assert len(alive) == 0
    finally:
        gc.enable()
    assert max(most) == 2 * a_layer
    assert streamed_bytes(frozen) == 0


def stop(*_arguments):
    raise RuntimeError("stop")


def test_kept_prefix_states_below(frozen, tokens, fetches):
    """Layers whose output is kept are not fetched."""
    rows = torch.tensor([4, 0, 2])
    with LayerGates(frozen, layers=[3, 4, 5]) as gates:
        states = PrefixStates.build(frozen, tokens, 3, batch=len(rows))
        with states.rows(rows):
            want = step(frozen, gates, tokens[rows])
    with streamed_layers(frozen, CPU), LayerGates(frozen, layers=[3, 4, 5]) as gates:
        states = PrefixStates.build(frozen, tokens, 3, batch=len(rows))
        for _ in range(2):
            fetches.clear()
            with states.rows(rows):
                assert_same(step(frozen, gates, tokens[rows]), want)
    assert taken(fetches) == [3, 4, 5, 4]


@pytest.mark.parametrize("how", ["inside", "outside", "of transformers"])
def test_with_another_checkpoint(frozen, tokens, how):
    """Recomputation of the run's own, or transformers' (5.17: around the hooks; 5.23: inside them)."""
    with LayerGates(frozen) as gates:
        want = step(frozen, gates, tokens, penalty=0.1)
    if how == "of transformers":
        frozen.train()
        frozen.gradient_checkpointing_enable({"use_reentrant": False})
    contexts = [streamed_layers(frozen, CPU), recomputed(frozen, [1, 2, 5] if how != "of transformers" else [])]
    first, second = contexts if how == "inside" else contexts[::-1]
    with first, second, LayerGates(frozen) as gates:
        assert_same(step(frozen, gates, tokens, penalty=0.1), want)


def trace(model):
    parts = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__)) for m in model.modules()]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return parts, [(name, id(tensor), tensor.data_ptr(), tensor.device) for name, tensor in tensors]


def test_no_trace_is_left(frozen, tokens):
    before, values = trace(frozen), [p.clone() for p in frozen.parameters()]

    def use_and_fail():
        with streamed_layers(frozen, CPU), LayerGates(frozen) as gates:
            gates.bypass([2])
            step(frozen, gates, tokens)
            assert isinstance(frozen.model.layers[0].__dict__["forward"], StreamedForward)
            stop()

    with pytest.raises(RuntimeError, match="stop"):
        use_and_fail()
    assert trace(frozen) == before
    assert_same(frozen.parameters(), values)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neo"])
def test_all_but_the_layers_weights_go_to_the_device_and_come_back(family):
    """A dtype stands for a device that is not here. Buffers go too, also those of layers; a tied head stays tied."""
    model = build(family)
    layers = layer_stack(model).layers
    before = trace(model)
    buffers = dict(model.named_buffers())
    with offload._others_on(model, layers, torch.float64):
        inside = {id(parameter) for parameter in layers.parameters()}
        assert {p.dtype for p in model.parameters() if id(p) in inside} == {torch.float32}
        assert {p.dtype for p in model.parameters() if id(p) not in inside} == {torch.float64}
        assert {buffer.dtype for buffer in model.buffers()} <= {torch.float64}
        assert {name: id(buffer) for name, buffer in model.named_buffers()} == {n: id(b) for n, b in buffers.items()}
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert (head.weight.data_ptr() == embedding.weight.data_ptr()) == model.config.tie_word_embeddings
    after = trace(model)
    assert after[0] == before[0]
    assert [entry for entry in after[1] if entry[0] not in buffers] == [e for e in before[1] if e[0] not in buffers]


def test_weights_that_want_gradients_are_refused(llama, tokens):
    with streamed_layers(llama, CPU):
        with torch.no_grad():
            llama(input_ids=tokens)
        with pytest.raises(UserError, match=r"layer 0 want gradients .* run.offload=none"):
            llama(input_ids=tokens)


def test_layers_that_are_not_on_the_host_are_refused(frozen):
    frozen.model.layers[1].to("meta")
    with pytest.raises(UserError, match="the layers are on meta already"), streamed_layers(frozen, CPU):
        pass


# Stages and commands


@pytest.fixture
def bare(monkeypatch):
    """Llama's MLPs that ran on the weights on the host: fetched ones are plain tensors."""
    calls, original = [], LlamaMLP.forward

    def watched(module, states):
        if isinstance(module.gate_proj.weight, torch.nn.Parameter):
            calls.append(module)
        return original(module, states)

    monkeypatch.setattr(LlamaMLP, "forward", watched)
    return calls


def config(offload, **values):
    base = {
        "num_layers": 2,
        "device": "cpu",
        "data": {"batch": 4},
        "select": {"steps_per_round": 2, "shortlist": 2, "judge": "cut"},
    }
    base |= {"transfer": {"epochs": 0}, "run": {"offload": offload}}
    return TRSPConfig.from_dict({name: merged(base.get(name), values.get(name)) for name in base.keys() | values})


def merged(base, change):
    return {**base, **change} if isinstance(base, dict) and change else base if change is None else change


@pytest.mark.parametrize(
    "select",
    [{"method": "trsp"}, {"method": "trsp", "protect_first": 2, "steps_per_round": 3}, {"method": "sleb"},
     {"method": "shortgpt"}],
    ids=["trsp", "trsp above a prefix", "sleb", "shortgpt"],
)  # fmt: skip
def test_the_same_layers_are_chosen_by_the_same_figures(llama, tokens, fetches, select):
    before = trace(llama)
    want = choose_layers(llama, tokens, config("none", select=select))
    assert fetches == []
    found = choose_layers(llama, tokens, config("weights", select=select))
    assert fetches != []
    assert (found.layers, found.history, found.rounds) == (want.layers, want.history, want.rounds)
    assert found.window_forwards == want.window_forwards
    assert trace(llama) == before


@pytest.mark.parametrize("windows", [1, 4])
def test_the_plan_counts_two_layers_and_not_all(windows):
    """Its parts against the peak of a step."""
    model = tiny_llama(layers=12, hidden_size=64, intermediate_size=256).requires_grad_(False)
    tokens = torch.randint(0, 97, (8, 16), generator=torch.Generator().manual_seed(1))
    plans = []
    events = Events(lambda kind, values: plans.append(values) if kind == "plan" else None)
    changes = {"data": {"batch": windows}, "select": {"schedule": "oneshot", "shortlist": 0}}
    choose_layers(model, tokens, config("weights", **changes), events)
    a_layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    assert plans[0]["parts"]["streamed layers"] == 2 * a_layer
    with streamed_layers(model, CPU), LayerGates(model) as gates:
        measured = peak_bytes(lambda: step(model, gates, tokens[:windows]), CPU)
    predicted = sum(plans[0]["parts"].values())
    assert 0.98 * measured <= predicted <= 1.15 * measured
    assert measured < 6 * a_layer


def test_layers_that_are_measured_are_fetched_once(frozen, tokens, fetches):
    with streamed_layers(frozen, CPU), LayerGates(frozen) as gates, resident(frozen, [1, 4]):
        assert taken(fetches) == [1, 4]
        with bypassed(frozen, [0, 2, 3, 5]):
            for _ in range(2):
                step(frozen, gates, tokens)
        assert taken(fetches) == []


def test_prune_without_stage_2_stays_streamed_and_writes_the_same(llama, tokens, tmp_path, bare):
    """Perplexities, proof and speed too: every pass is on fetched weights."""
    want = trsp.prune(copy.deepcopy(llama), tokens, config("none"), out=tmp_path / "plain", evaluation=tokens)
    bare.clear()
    found = trsp.prune(llama, tokens, config("weights"), out=tmp_path / "streamed", evaluation=tokens)
    assert bare == []
    assert found.removed_layers == want.removed_layers
    assert found.history == want.history
    assert found.perplexity == want.perplexity
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "streamed"))
    assert one == other


def test_prune_moves_the_model_to_the_device_for_stage_2(llama, tokens, fetches, monkeypatch):
    stage_2 = {"transfer": {"epochs": 1}}
    want = trsp.prune(copy.deepcopy(llama), tokens, config("none", **stage_2), evaluation=tokens)
    original = pruner.transfer

    def watched(model, *arguments, **options):
        assert not any(isinstance(layer.__dict__.get("forward"), StreamedForward) for layer in model.model.layers)
        fetches.clear()
        return original(model, *arguments, **options)

    monkeypatch.setattr(pruner, "transfer", watched)
    found = trsp.prune(llama, tokens, config("weights", **stage_2), evaluation=tokens)
    assert fetches == []
    assert found.history == want.history
    assert found.perplexity == want.perplexity
    assert_same(found.model.parameters(), want.model.parameters())


@pytest.mark.parametrize("command", ["prune", "plan"])
def test_a_device_that_cannot_train_it_is_refused(llama, tokens, monkeypatch, command):
    """Before stage 1, though weights that stay as they are would fit."""
    # on a CPU the weights are there already: their teacher, gradients and AdamW's two moments are to come
    needed = 16 * sum(p.numel() for p in llama.parameters())
    monkeypatch.setattr(transfer_module, "free_memory", lambda _device: needed - 1)
    started = []
    events = Events(lambda kind, _values: started.append(kind))
    settings = config("weights", transfer={"epochs": 1, "hold": 0.5})
    work = plan_module.forecast if command == "plan" else lambda *arguments: trsp.prune(*arguments, events=events)
    with pytest.raises(UserError, match=r"stage 2 trains the weights on cpu .* give transfer.epochs=0"):
        work(llama, tokens, settings)
    assert started == []
    monkeypatch.setattr(transfer_module, "free_memory", lambda _device: needed)
    transfer_module.require_room(llama, [], settings.transfer, CPU)


@pytest.mark.parametrize(
    ("dtype", "changes", "each"),
    [
        (torch.float32, {}, 20),  # docs/scaling.md counts the same
        (torch.bfloat16, {}, 18),
        (torch.bfloat16, {"objective": "lm", "hidden": 0.0}, 16),
        (torch.bfloat16, {"optimizer": "adamw8bit"}, 12.03),
    ],
)
def test_what_stage_2_holds(llama, dtype, changes, each):
    settings = config("weights", transfer={"epochs": 1, "hold": 0.5, **changes}).transfer
    number = sum(p.numel() for p in llama.parameters())
    assert transfer_module.bytes_held(llama.to(dtype), [1], settings) == pytest.approx(each * number, rel=1e-3)


def test_neighbours_hold_less(llama):
    settings = config("weights", transfer={"epochs": 1, "hold": 0.5, "trainable": "neighbours"}).transfer
    trained = sum(p.numel() for p in transfer_module.trainable_weights(llama, [1], "neighbours").values())
    frozen = sum(p.numel() for p in llama.parameters()) - trained
    assert 0 < trained < frozen
    assert transfer_module.bytes_held(llama, [1], settings) == 20 * trained + 4 * frozen


@pytest.mark.parametrize("epochs", [0, 1])
def test_a_run_is_forecast(llama, tokens, epochs, bare):
    forecast = plan_module.forecast(llama, tokens, config("weights", transfer={"epochs": epochs}), tokens)
    assert (bare == []) == (not epochs)
    assert forecast.memory["stage 1"]["streamed layers"] > 0
    assert forecast.steps["stage 1"] == 4
    assert ("stage 2" in forecast.steps) == bool(epochs)


def test_weights_trained_in_stage_1_are_refused():
    with pytest.raises(UserError, match=r"run.offload is weights but select.train_weights is true"):
        config("weights", select={"train_weights": True})
    with pytest.raises(UserError, match=r"run.offload is 'disk'; it must be one of none, weights"):
        config("disk")


def test_compiling_is_said_not_to_reach_streamed_layers(llama, tokens):
    notes = []
    events = Events(lambda kind, values: notes.append(values["text"]) if kind == "note" else None)
    choose_layers(llama, tokens, config("weights", run={"offload": "weights", "compile": True}), events)
    assert notes == ["run.compile is for stage 2 only here: streamed layers are not compiled."]


@pytest.mark.parametrize(("how", "where"), [("none", "cuda"), ("weights", "cpu")])
def test_commands_load_onto_the_host(monkeypatch, how, where):
    seen = []
    monkeypatch.setattr("trsp_fast.models.checkpoint.load_model", lambda _name, **options: seen.append(options))
    common.load("model", TRSPConfig.from_dict({"device": "cuda", "run": {"offload": how}}), None, False, dtype="auto")
    assert seen[0]["device"] == where


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(frozen, tokens):
    gpu = torch.device("cuda")
    resident_model = copy.deepcopy(frozen).to(gpu)
    with LayerGates(resident_model) as gates:
        want = step(resident_model, gates, tokens.to(gpu))
    with streamed_layers(frozen, gpu), LayerGates(frozen) as gates:
        assert frozen.model.layers[0].mlp.up_proj.weight.is_pinned()
        assert gates.values.device.type == "cuda"
        for _ in range(20):  # a copy that is not waited for, or written over, shows in some
            found = step(frozen, gates, tokens.to(gpu))
            torch.testing.assert_close(found[0], want[0], rtol=1e-6, atol=0)
            torch.testing.assert_close(found[1], want[1], rtol=1e-4, atol=1e-6)
        frozen.model.rotary_emb.register_buffer("inv_freq", frozen.model.rotary_emb.inv_freq.clone())  # as dynamic ones
    assert {tensor.device.type for tensor in (*frozen.parameters(), *frozen.buffers())} == {"cpu"}
