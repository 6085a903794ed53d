"""speed: the protocol asked for is the one that is run, and its figures belong together. No time is asserted."""

import json

import pytest
import torch
from tiny import tiny_llama

from trsp_fast import remove_layers
from trsp_fast.errors import UserError
from trsp_fast.report import speed
from trsp_fast.report.footprint import busy_seconds, covered, peak_growth
from trsp_fast.report.shapes import SHAPES, random_model
from trsp_fast.report.speed import Protocol, compare_speed

# Parameters as the published checkpoints have them.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "opt-2.7b": 2_651_596_800,
    "opt-13b": 12_853_473_280,
    "phi-2": 2_779_683_840,
}
CPU = torch.device("cpu")
QUICK = Protocol(batch=2, new_tokens=3, prompt=5, rounds=3)


@pytest.fixture
def generated(monkeypatch):
    """What `generate` was asked for, call by call, with a clock that each of its calls moves on by its layers."""
    calls, clock = [], [0.0]
    whole = speed._generate

    def recorded(model, batch, length, new, options=None):
        calls.append((model.config.num_hidden_layers, batch, length, new, (options or {}).get("cache_implementation")))
        whole(model, batch, length, new, options)
        clock[0] += model.config.num_hidden_layers

    monkeypatch.setattr(speed, "_generate", recorded)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    return calls


def test_models_take_turns_and_figures_belong_together(generated):
    large = tiny_llama(4)
    small, told = remove_layers(large, [1, 2]), []
    protocol = Protocol(batch=2, new_tokens=3, prompt=5, rounds=3, caches=("dynamic", "static"))
    first, second = compare_speed([large, small], protocol, lambda *done: told.append(done))
    one_round = [
        (4, 1, 5, 1, None), (2, 1, 5, 1, None),
        (4, 2, 1, 3, None), (2, 2, 1, 3, None),
        (4, 2, 1, 3, "static"), (2, 2, 1, 3, "static"),
    ]  # fmt: skip
    assert generated == one_round * 5  # warm-up, memory and three that count
    assert told == [(done, 36) for done in range(1, 37)]  # and the host's share, which takes a GPU
    assert (first.layers, second.layers) == (4, 2)
    assert second.parameters_of_first == second.parameters / first.parameters < 1
    assert second.weight_bytes == second.parameters * 4
    for measured, tokens in ((second.latency, 5), (second.generation["dynamic"], 6), (second.generation["static"], 6)):
        assert measured.rounds == [2.0] * 3
        assert measured.seconds == 2.0
        assert measured.times_first == 2.0
        assert measured.tokens_per_second == tokens / 2
        assert measured.host_bound is None
    assert first.latency.times_first == first.generation["static"].times_first == 1.0


@pytest.mark.usefixtures("generated")
def test_seconds_are_the_median(monkeypatch):
    times = iter([0, 9, 10, 10, 20, 21, 30, 35, 40, 42, 50, 51])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(times)))
    (found,) = compare_speed([tiny_llama(1)], QUICK)
    assert (found.latency.rounds, found.latency.seconds) == ([9.0, 1.0, 2.0], 2.0)
    assert found.generation["dynamic"].rounds == [0.0, 5.0, 1.0]


def test_exactly_so_many_tokens_are_generated(llama):
    llama.generation_config.eos_token_id = list(range(97))  # whatever comes would end the text
    speed._generate(llama, 2, 3, 4)
    speed._generate(llama, 2, 3, 4, speed._cache_options("static", CPU))


@pytest.mark.slow  # compiles
def test_the_decoding_step_is_compiled_when_asked_for():
    model = tiny_llama(1)
    (found,) = compare_speed([model], Protocol(batch=2, new_tokens=3, prompt=4, rounds=1, caches=("compiled",)))
    assert set(found.generation) == {"compiled"}
    assert hasattr(model, "_compiled_call")


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    monkeypatch.setattr(speed, "_cache_options", lambda cache, device: {})
    with pytest.raises(UserError, match="does not compile the decoding of LlamaForCausalLM; leave out --compile"):
        compare_speed([tiny_llama(1)], Protocol(batch=1, new_tokens=2, prompt=2, rounds=1, caches=("compiled",)))


def test_too_large_a_batch_is_a_sentence(llama, monkeypatch):
    def full(*_arguments):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(speed, "_generate", full)
    with pytest.raises(UserError, match="a batch of 2 with 3 new tokens, or a prompt of 5, does not fit"):
        compare_speed([llama], QUICK)


def test_lengths_are_cut_to_the_shortest_context():
    models = [tiny_llama(1), tiny_llama(1, max_position_embeddings=16)]
    protocol, notes = Protocol(prompt=64, new_tokens=15).within(models)
    assert (protocol.prompt, protocol.new_tokens, protocol.batch) == (16, 15, 64)
    assert notes == ["the prompt has 16 tokens, not 64, in a context of 16."]
    protocol, notes = Protocol().within(models[:1])
    assert (protocol.prompt, protocol.new_tokens) == (64, 63)
    assert len(notes) == 2
    assert Protocol(prompt=8, new_tokens=8).within(models) == (Protocol(prompt=8, new_tokens=8), [])


def test_memory_is_what_the_work_holds_at_once():
    size = 64 << 20

    def work():
        held = torch.ones(size, dtype=torch.uint8)
        del held
        torch.ones(size // 2, dtype=torch.uint8)

    torch.ones(4 * size, dtype=torch.uint8)  # an earlier, higher peak does not count
    growths = [peak_growth(work, CPU) for _ in range(3)]
    if growths[0] is None:
        pytest.skip("this system does not tell the peak of the resident set")
    assert size * 0.95 < min(growths) < size * 1.3  # what else the system does meanwhile only adds


def test_memory_of_a_model_counts_its_weights(llama):
    (found,) = compare_speed([llama], QUICK)
    if found.latency.peak_bytes is None:
        pytest.skip("this system does not tell the peak of the resident set")
    assert found.weight_bytes == sum(p.nbytes for p in llama.parameters())
    assert found.latency.peak_bytes >= found.weight_bytes


def test_spans_that_overlap_count_once():
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1.5, 2), (7, 8)]) == 6
    assert busy_seconds(lambda: None, CPU) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_tells_its_memory_and_how_long_it_waits():
    model = random_model("tiny", device=torch.device("cuda"), dtype=torch.bfloat16)
    (found,) = compare_speed([model], Protocol(batch=2, new_tokens=8, prompt=16, rounds=2))
    for measured in (found.latency, found.generation["dynamic"]):
        assert measured.peak_bytes > found.weight_bytes
        assert 0 < measured.host_bound < 1  # so small a model waits, and computes

    def work():
        torch.ones(1 << 20, device="cuda")

    assert peak_growth(work, torch.device("cuda")) == 4 << 20


# ---- shapes


def test_every_shape_has_the_published_number_of_parameters():
    assert set(PUBLISHED) | {"tiny"} == set(SHAPES)
    from trsp_fast.report.shapes import _made

    for shape, parameters in PUBLISHED.items():
        with torch.device("meta"):
            assert _made(shape, torch.bfloat16).num_parameters() == parameters, shape


def test_a_random_model_has_its_dtype_and_the_same_weights_each_time():
    one, two = (random_model("tiny", device=CPU, dtype=torch.bfloat16) for _ in range(2))
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not one.training


def test_a_shape_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("trsp_fast.report.shapes.free_memory", lambda device: 20e9)
    with pytest.raises(UserError, match=r"'opt-13b' needs 25.7 GB for its weights in bfloat16, 20.0 GB are free"):
        random_model("opt-13b", device=CPU, dtype=torch.bfloat16)


# ---- the command


SHORT = ("--batch", 2, "--new-tokens", 2, "--prompt", 4, "--rounds", 1)


def test_a_shape_is_measured_with_and_without_layers(run):
    words = ("--shape", "tiny", "--ratio", "0.25,0.5", "--static-cache", "--device", "cpu", "--json", *SHORT)
    code, text, error = run("speed", *words)
    assert (code, error) == (0, "")
    found = json.loads(text)
    names = ["tiny", "tiny without 1 of 4 layers", "tiny without 2 of 4 layers"]
    assert [one["model"] for one in found["models"]] == names
    assert [one["layers"] for one in found["models"]] == [4, 3, 2]
    assert all(set(one["generation"]) == {"dynamic", "static"} for one in found["models"])
    assert all(one["checkpoint_bytes"] is None for one in found["models"])
    assert found["protocol"]["batch"] == 2
    assert found["dtype"] == "float32"
    assert found["machine"]["torch"] == torch.__version__


def test_folders_and_demo_are_measured_side_by_side(run, tmp_path):
    tiny_llama(2).save_pretrained(tmp_path / "small")
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    code, text, error = run("speed", "demo", tmp_path / "small", tmp_path / "small", *SHORT[:-4], "--rounds", 1)
    assert code == 0, error
    assert "note: the prompt has 64 tokens, not 2048, in a context of 64." in error
    assert text.count("(2)") == 3  # the second of one name, in each table
    assert "generating, dynamic cache" in text
    assert "reading 64 tokens" in text
    assert f"{size / 1000:.2f} kB" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "neither was given; name models to measure, or a --shape."),
        (("demo", "--shape", "tiny"), "both demo and --shape tiny were given; name models to measure, or a --shape."),
        (("--shape", "gpt-5"), "shape 'gpt-5' is unknown; give one of llama2-7b"),
        (("--shape", "tiny", "--batch", 0), "batch is 0; give 1 or more."),
        (("--shape", "tiny", "--new-tokens", 0), "new-tokens is 0; give 1 or more."),
        (("--shape", "tiny", "--ratio", "half"), "ratio is 'half'; give numbers with commas."),
        (("--shape", "tiny", "--ratio", "1.5"), "ratio"),
    ],
)
def test_mistakes_are_one_sentence(run, arguments, sentence):
    code, text, error = run("speed", *arguments)
    assert (code, text) == (2, "")
    assert sentence in error
    assert error.count("\n") == 1
