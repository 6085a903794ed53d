"""Scores on tasks of lm-evaluation-harness, with a task defined in a folder: nothing is fetched."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama

from trsp_fast import remove_layers
from trsp_fast.compare.arms import chosen_arms
from trsp_fast.compare.output import compare_into
from trsp_fast.compare.runner import Comparer
from trsp_fast.config import TRSPConfig
from trsp_fast.data import demo_model
from trsp_fast.errors import Interrupted, UserError
from trsp_fast.models.checkpoint import load_model, load_tokenizer
from trsp_fast.models.gates import bypassed
from trsp_fast.report.tasks import _score, score_tasks, task_manager
from trsp_fast.run.events import Events

EXAMPLES = [
    ("import os\nimport", [" sys", " zebra"], 0),
    ("for index in", [" range", " None"], 1),
    ("if value is not", [" import", " None"], 1),
    ("class Error:\n    def", [" zebra", " __init__"], 0),
    ("while", [" True", " except"], 0),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra tasks)")
    pytest.importorskip("accelerate", reason="accelerate is not installed (the extra tasks)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("tasks")
    rows = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in EXAMPLES]
    (home / "rows.jsonl").write_text("\n".join(rows) + "\n")
    for name, metric in (("local_code", "acc"), ("local_norm", "acc_norm")):
        (home / f"{name}.yaml").write_text(TASK.format(name=name, file=home / "rows.jsonl", metric=metric))
    (home / "broken.yaml").write_text(TASK.format(name="broken", file=home / "gone.jsonl", metric="acc"))
    return home


@pytest.fixture(scope="module")
def demo():
    return load_model(str(demo_model()), dtype="float32", device="cpu"), load_tokenizer(str(demo_model()))


@torch.no_grad()
def right_by_hand(model, tokenizer):
    """Whether the likelier continuation is the right one, for each example."""
    found = []
    for question, choices, answer in EXAMPLES:
        scores = []
        for choice in choices:
            context, whole = tokenizer(question)["input_ids"], tokenizer(question + choice)["input_ids"]
            assert whole[: len(context)] == context
            logits = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logits[at - 1, whole[at]]) for at in range(len(context), len(whole))))
        found.append(scores.index(max(scores)) == answer)
    return found


@pytest.mark.usefixtures("harness")
def test_scores_are_those_of_a_loop_by_hand(folder, demo):
    model, tokenizer = demo
    right = right_by_hand(model, tokenizer)
    assert 0 < sum(right) < len(right)  # else a constant would pass
    scores = score_tasks(model, tokenizer, ["local_code", "local_norm", "local_code"], include_path=folder)
    assert list(scores) == ["local_code", "local_norm"]
    assert scores["local_code"] == pytest.approx(sum(right) / len(right))
    two = score_tasks(model, tokenizer, ["local_code"], include_path=folder, limit=2)
    assert two == {"local_code": pytest.approx(sum(right[:2]) / 2)}
    assert not model.training


@pytest.mark.usefixtures("harness")
def test_what_is_not_there_is_said_in_a_sentence(folder, demo, tmp_path):
    with pytest.raises(UserError, match=r"task 'broken' cannot be loaded \(.*gone.jsonl"):
        score_tasks(*demo, ["broken"], include_path=folder)
    with pytest.raises(UserError, match="is no folder"):
        task_manager(["local_code"], tmp_path / "nowhere")


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "accelerate", sys)
    with pytest.raises(UserError, match=r"'lm_eval' is not installed; run pip install 'trsp_fast\[tasks\]'\.$"):
        task_manager(["piqa"])


@pytest.mark.usefixtures("harness")
def test_eval_and_compare_score_tasks(run, folder, demo, tmp_path):
    tasks = ("--tasks", "local_code,local_norm", "--task-path", folder)
    code, text, error = run("eval", "demo", *tasks, "--json")
    assert code == 0, error
    answer = json.loads(text)
    assert set(answer["tasks"]) == {"local_code", "local_norm"}
    assert answer["tasks_mean"] == pytest.approx(sum(answer["tasks"].values()) / 2)
    assert "perplexity" not in answer
    (tmp_path / "text.txt").write_text(Path(__file__).read_text())
    short = ("--data", tmp_path / "text.txt", "--set", "data.samples=2", "--set", "data.seq_len=16")
    settings = ("--ratio", "0.17", "--arms", "first", "--seeds", "0", "--limit", "3", *short)
    code, text, error = run("compare", "demo", *settings, *tasks, "--out", tmp_path / "out", "--json")
    assert code == 0, error
    rows = {row["arm"]: row for row in json.loads(text)["arms"]}
    model, tokenizer = demo
    assert rows["first"]["layers"] == [0, 1]  # without layer 0 a KV cache bears no bypass
    small = remove_layers(model, [0, 1])
    expected = score_tasks(small, tokenizer, ["local_code"], include_path=folder, limit=3)
    assert rows["first"]["tasks"]["local_code"] == expected["local_code"]
    with bypassed(model, [0, 1]), pytest.raises(UserError, match="KV cache"):
        score_tasks(model, tokenizer, ["local_code"], include_path=folder, limit=1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--limit", "3"], "no tasks were named; give them as --tasks piqa,arc_easy."),
        (["--tasks", "piqa", "--limit", "0"], "--limit is 0; give 1 or more examples, or leave it out for all."),
        ([], "nothing says what to evaluate on; give --data, or --tasks."),
    ],
)
def test_mistakes_are_one_sentence(run, arguments, sentence):
    assert run("eval", "demo", *arguments) == (2, "", f"trsp-fast: {sentence}\n")


def test_an_interrupted_comparison_goes_on_with_the_same_tasks_only(tmp_path):
    def comparer(about, stop):
        def killer(kind, values):
            if kind == "arm_done" and values["arm"] == "first" and stop:
                raise KeyboardInterrupt

        tokens = torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(1))
        found = Comparer(tiny_llama(3), lambda seed: tokens, tokens, TRSPConfig(num_layers=1), events=Events(killer))
        found.tasks, found.tasks_about = lambda model: {"count": float(model.config.num_hidden_layers)}, about
        return found

    arms, about = chosen_arms("first"), {"model": "tiny", "data": "random", "command": "", "evaluation_data": None}
    about["versions"] = {"trsp_fast": "0", "torch": "0"}
    with pytest.raises(Interrupted):
        compare_into(tmp_path / "out", comparer({"names": ["count"]}, stop=True), arms, [1], [0], about)
    with pytest.raises(UserError, match="had tasks"):
        compare_into(tmp_path / "out", comparer({"names": ["piqa"]}, False), arms, [1], [0], about, resume=True)
    found = compare_into(tmp_path / "out", comparer({"names": ["count"]}, False), arms, [1], [0], about, resume=True)
    assert [row["tasks"] for row in found["arms"]] == [{"count": 3.0}, {"count": 2.0}]  # rebuilt, not bypassed


def test_accuracy_comes_before_other_figures():
    values = {"alias": "x", "sample_len": 5, "acc_norm,none": 0.5, "acc,none": 0.25, "acc_stderr,none": 0.01}
    assert _score(values) == 0.25
    assert _score({"alias": "x", "exact_match_stderr,none": 0.1, "exact_match,flexible": 0.75}) == 0.75
    assert _score({"alias": "a group without a figure of its own", "sample_len": 5}) is None
