import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from trsp_fast import data
from trsp_fast.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data.demo_model())


TEXTS = ["def first():\n    return 1", "class Second:\n    pass", "third = [1, 2, 3]"] * 5


def write(kind, folder):
    if kind == "txt":
        (folder / "x.txt").write_text("\n\n".join(TEXTS))
    elif kind == "jsonl":
        (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    else:
        datasets = pytest.importorskip("datasets", reason="datasets is not installed")

        table = datasets.Dataset.from_dict({"text": TEXTS})
        if kind == "parquet":
            table.to_parquet(folder / "x.parquet")
        else:
            table.save_to_disk(folder / "x.folder")
    return str(folder / f"x.{kind}")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder"])
def test_every_kind_of_file_gives_the_same_stream(tokenizer, tmp_path, kind):
    expected = torch.tensor(tokenizer("\n\n".join(TEXTS))["input_ids"])
    assert torch.equal(data.evaluation_stream(write(kind, tmp_path), tokenizer), expected)


def test_the_last_tenth_is_kept_for_evaluation(tokenizer, tmp_path):
    path = write("txt", tmp_path)
    whole = data.evaluation_stream(path, tokenizer)
    streams = data.load_streams(path, tokenizer)
    assert torch.equal(torch.cat([streams.calibration, streams.evaluation]), whole)
    assert len(streams.evaluation) == len(whole) // 10
    other = data.load_streams(path, tokenizer, evaluation=path)
    assert torch.equal(other.calibration, whole)
    assert torch.equal(other.evaluation, whole)


def test_messages_go_through_the_chat_template(tokenizer, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    with pytest.raises(UserError, match="no chat template"):
        data.evaluation_stream(str(path), tokenizer)
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    try:
        stream = data.evaluation_stream(str(path), tokenizer)
    finally:
        tokenizer.chat_template = template
    assert tokenizer.decode(stream) == "<user>hello"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.int16])
def test_token_files_of_any_integer_type(tmp_path, dtype):
    tokens = torch.arange(40).view(10, 4)
    save_file({"tokens": tokens.to(dtype)}, tmp_path / "t.safetensors")
    streams = data.load_streams(str(tmp_path / "t.safetensors"), None)
    assert torch.equal(streams.calibration, tokens[:9])
    assert torch.equal(streams.evaluation, tokens[9:])


def test_windows_drop_the_rest_and_samples_do_not_repeat():
    stream = torch.arange(103)
    assert torch.equal(data.windows(stream, 10), torch.arange(100).view(10, 10))
    drawn = data.calibration_windows(stream, 6, 10, seed=1)
    assert len({int(row[0]) for row in drawn}) == 6
    assert torch.equal(drawn, data.calibration_windows(stream, 6, 10, seed=1))
    assert not torch.equal(drawn, data.calibration_windows(stream, 6, 10, seed=2))
    assert data.calibration_windows(stream, 600, 10, seed=1).shape == (10, 10)
    assert data.evaluation_windows(stream, 10, most=3)[:, 0].tolist() == [0, 40, 90]


def test_the_demo_corpus_is_split_by_path_and_never_overlaps():
    train, held_out = data.standard_library("train"), data.standard_library("held-out")
    assert not set(train) & set(held_out)
    share = sum(map(len, held_out)) / sum(map(len, train + held_out))
    assert 0.05 < share < 0.2
    assert data.corpus_digest(train) == data.corpus_digest(data.standard_library("train"))
    assert data.corpus_digest(train) != data.corpus_digest(train[1:])


def test_hub_data_that_cannot_be_had_is_one_sentence(monkeypatch, tokenizer):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def offline(*_arguments, **_options):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"data 'wikitext2' cannot be fetched \(no route\); give a local file instead"):
        data.load_streams("wikitext2", tokenizer)


@pytest.mark.parametrize("name", data.HUB_DATASETS)
def test_hub_data_takes_the_split_and_the_column_of_its_row(monkeypatch, tokenizer, name):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    seen = []

    def fake(hub_id, configuration, split, **options):
        seen.append((hub_id, configuration, split, options))
        column = data.HUB_DATASETS[name][4]
        return datasets.Dataset.from_dict({column: [f"{split} one", f"{split} two"]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    streams = data.load_streams(name, tokenizer)
    hub_id, configuration, calibration, evaluation, _, options = data.HUB_DATASETS[name]
    assert seen == [(hub_id, configuration, calibration, options), (hub_id, configuration, evaluation, options)]
    assert tokenizer.decode(streams.calibration) == f"{calibration} one\n\n{calibration} two"
    assert tokenizer.decode(streams.evaluation) == f"{evaluation} one\n\n{evaluation} two"


def test_noise_replaces_a_share_of_the_tokens_by_others_of_the_text():
    tokens = torch.arange(20_000).view(100, 200) * 3  # all different: what is replaced can be seen
    before, noisy = tokens.clone(), data.with_noise(tokens, 0.25, 3)
    assert torch.equal(tokens, before)
    assert float((noisy != tokens).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert bool(torch.isin(noisy, tokens).all())
    assert float(noisy[noisy != tokens].float().mean()) == pytest.approx(float(tokens.float().mean()), rel=0.03)
    assert float((noisy != tokens).float().mean(1).std()) < 0.06  # in every window alike
    assert torch.equal(noisy, data.with_noise(tokens, 0.25, 3))
    assert not torch.equal(noisy, data.with_noise(tokens, 0.25, 4))
    assert data.with_noise(tokens, 0.0, 3) is tokens
    assert data.with_noise(tokens.to("meta"), 0.25, 3).device.type == "meta"  # it is made on the CPU for any device
    often = torch.where(tokens % 10 == 0, tokens, 7)  # a token that is nine tenths of the text is that often drawn
    assert float((data.with_noise(often, 1.0, 3) == 7).float().mean()) == pytest.approx(0.9, abs=0.01)
