"""Perplexity equals what the protocols say, written out as plain loops; and it survives little memory."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from trsp_fast.errors import UserError
from trsp_fast.report.perplexity import authors_perplexity, perplexity, strided_perplexity


@pytest.fixture
def stream():
    return torch.randint(0, 97, (103,), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def losses_by_hand(model, tokens, first):
    """The loss of each token from position `first` on, given all that come before it in `tokens`; float64."""
    logits = model(input_ids=tokens[None]).logits[0].double()
    return F.cross_entropy(logits[first - 1 : -1], tokens[first:], reduction="none")


def sliding_by_hand(model, stream, length, stride):
    """Every token scored once, by the first window that reaches it; windows begin every `stride` tokens."""
    found, reached = [], 0
    for begin in range(0, len(stream), stride):
        end = min(begin + length, len(stream))
        first = max(1, reached - begin)  # a window's first token has nothing before it
        found.append(losses_by_hand(model, stream[begin:end], first))
        reached = end
        if end == len(stream):
            break
    return math.exp(torch.cat(found).mean())


def test_windows_equal_a_loop(llama, stream):
    windows = stream[: 103 // 16 * 16].view(-1, 16)
    expected = math.exp(torch.cat([losses_by_hand(llama, window, 1) for window in windows]).mean())
    assert perplexity(llama, windows) == pytest.approx(expected, rel=1e-6)
    assert perplexity(llama, windows, batch=4) == pytest.approx(expected, rel=1e-6)
    assert authors_perplexity(llama, windows) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stride", [1, 5, 8, 15, 16, 17])
@pytest.mark.parametrize("length", [17, 103])
def test_strides_equal_a_loop(llama, stream, length, stride):
    # (103 - 17) % 43 == 0 has no rest, the strides here have rests of several lengths
    found = strided_perplexity(llama, stream, length, stride, batch=7)
    assert found == pytest.approx(sliding_by_hand(llama, stream, length, stride), rel=1e-6)


def test_strides_without_a_rest(llama, stream):
    assert strided_perplexity(llama, stream[:49], 17, 8) == pytest.approx(
        sliding_by_hand(llama, stream[:49], 17, 8), rel=1e-6
    )
    # one token that is left alone in its window cannot be predicted there
    assert strided_perplexity(llama, stream[:49], 16, 16) == pytest.approx(
        perplexity(llama, stream[:48].view(-1, 16)), rel=1e-6
    )


def test_more_context_is_seen(stories, stories_text):
    from trsp_fast.data import evaluation_stream
    from trsp_fast.models.checkpoint import load_tokenizer

    text = evaluation_stream(str(stories_text), load_tokenizer(stories.config._name_or_path))[:1025]
    plain = perplexity(stories, text[:1024].view(-1, 128))
    assert strided_perplexity(stories, text, 128, 64) < plain


@pytest.mark.parametrize("stride", [0, 17, -1])
def test_an_impossible_stride_is_refused(llama, stream, stride):
    with pytest.raises(UserError, match=f"the stride is {stride}; give 1 to 16"):
        strided_perplexity(llama, stream, 16, stride)


def test_windows_and_short_streams_have_no_strides(llama, stream):
    with pytest.raises(UserError, match="separate windows of 8 tokens; a stride needs one text of at least 16"):
        strided_perplexity(llama, stream[:96].view(-1, 8), 16, 4)
    with pytest.raises(UserError, match="has 15 tokens"):
        strided_perplexity(llama, stream[:15], 16, 4)


class Small:
    """A model's forward that runs out of memory above so many windows."""

    def __init__(self, model, most):
        self.forward, self.most, self.sizes = model.forward, most, []
        model.forward = self

    def __call__(self, *arguments, **options):
        self.sizes.append(len(options["input_ids"]))
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.forward(*arguments, **options)


def test_a_batch_that_does_not_fit_is_halved(llama, stream):
    windows = stream[:96].view(-1, 8)
    expected, told = perplexity(llama, windows), []
    small = Small(llama, 3)
    found = perplexity(llama, windows, batch=8, progress=lambda *done: told.append(done))
    assert found == pytest.approx(expected, rel=1e-6)
    assert small.sizes == [8, 4, 2, 2, 2, 2, 2, 2]
    assert told == [(done, 12) for done in (2, 4, 6, 8, 10, 12)]


def test_a_window_that_does_not_fit_is_a_sentence_and_other_errors_go_on(llama, stream):
    Small(llama, 0)
    with pytest.raises(UserError, match="a window of 8 tokens does not fit into memory; give a smaller --seq-len"):
        perplexity(llama, stream[:96].view(-1, 8))
    llama.forward = lambda **options: (_ for _ in ()).throw(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        perplexity(llama, stream[:96].view(-1, 8))


def test_eval_has_protocols_and_strides(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def add(first, second):\n    return first + second\n\n\n" * 30)
    found = {}
    for name, options in (("standard", ()), ("strided", ("--stride", 8)), ("authors", ("--protocol", "authors"))):
        code, answer, error = run("eval", "demo", "--data", text, "--seq-len", 32, "--json", *options)
        assert code == 0, error
        found[name] = json.loads(answer)
    assert found["strided"]["stride"] == 8
    assert found["strided"]["perplexity"] < found["standard"]["perplexity"]
    assert found["authors"]["protocol"] == "authors"
    assert found["authors"]["perplexity"] == pytest.approx(found["standard"]["perplexity"], rel=1e-6)
    code, answer, _ = run("eval", "demo", "--data", text, "--seq-len", 32, "--stride", 8)
    assert f"perplexity {found['strided']['perplexity']:.4f} on" in answer
    assert "in windows of 32, one every 8" in answer


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--protocol", "author"), "the protocol is 'author'; give standard or authors."),
        (("--protocol", "authors", "--stride", 8), "--stride is 8 and the authors' protocol has none"),
        (("--protocol", "authors"), "windows of 2048 tokens and the model's context is 256; give --seq-len 256"),
        (("--stride", 8), "separate windows of 64 tokens; a stride needs one text"),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path, options, sentence):
    path = tmp_path / "tokens.safetensors"
    save_file({"tokens": torch.zeros(2, 64, dtype=torch.long)}, path)
    code, text, error = run("eval", "demo", "--data", path, *options)
    assert (code, text) == (2, "")
    assert sentence in error
    assert error.count("\n") == 1
