"""Perplexity, speed and the page."""

import math

import pytest
import torch
from pages import REPORT, Page
from torch.nn import functional as F

from trsp_fast import perplexity
from trsp_fast.report.html import figure_text, size_text, write_report
from trsp_fast.report.speed import measure_speed
from trsp_fast.run.events import Events, JsonLines


def test_perplexity_equals_a_hand_written_loop(llama, tokens):
    total, count = 0.0, 0
    for row in tokens:
        logits = llama(input_ids=row[None]).logits[0].double()
        total += float(F.cross_entropy(logits[:-1], row[1:], reduction="sum").detach())
        count += len(row) - 1
    assert perplexity(llama, tokens) == pytest.approx(math.exp(total / count), rel=1e-6)
    assert perplexity(llama, tokens, batch=3) == pytest.approx(math.exp(total / count), rel=1e-6)


def test_perplexity_leaves_the_training_mode(llama, tokens):
    llama.train()
    perplexity(llama, tokens)
    assert llama.training


def test_speed_is_measured_for_each_model(llama):
    measured = measure_speed({"one": llama, "two": llama})
    assert set(measured) == {"one", "two"}
    for values in measured.values():
        assert values["parameters"] == llama.num_parameters()
        assert values["prompt_tokens_per_second"] > 0
        assert values["generated_tokens_per_second"] > 0


def test_the_page_shows_every_number_and_is_self_contained(tmp_path):
    write_report(REPORT, tmp_path / "report.html")
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert page.open == []
    text = " ".join(" ".join(page.text).split())
    assert "2 of 5 layers removed, perplexity 10.00 → 12.25, generation 1.50 times as fast, export proven." in text
    for shown in (
        "30.00",
        "11.50",
        "1,234",
        "0.250",
        "2.0e-04",
        "3.500",
        "4.00 kB",
        "2.40 kB",
        "trsp-fast prune x --layers 1,3",
        "10% of them were replaced",
        "select.lr",
    ):
        assert shown in text, shown
    assert "<script>alert(1)</script>" in text  # as text, not as a tag


def test_the_page_says_when_nothing_is_proven(tmp_path):
    checks = [{"name": "reload", "passed": False, "detail": "1 differs"}]
    write_report({**REPORT, "proven": False, "checks": checks, "perplexity": {}}, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "export NOT proven" in text
    assert '<span class="bad">no</span>' in text


def test_figures_and_sizes():
    assert [size_text(n) for n in (None, 12, 1500, 2.5e6, 3e12)] == [
        "not written",
        "12 B",
        "1.50 kB",
        "2.50 MB",
        "3000.00 GB",
    ]
    assert figure_text(1234.567) == "1,234.57"
    assert figure_text(0.0, 1) == "0.0"


def test_events_reach_every_listener_in_order(tmp_path):
    seen = []
    log = JsonLines(tmp_path / "events.jsonl")
    events = Events(lambda kind, values: seen.append((kind, values)), log)
    events.emit("step", loss=1.5)
    events.note("a sentence")
    log.close()
    assert seen == [("step", {"loss": 1.5}), ("note", {"text": "a sentence"})]
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert '"event": "step", "loss": 1.5' in lines[0]


def test_measured_models_are_left_in_their_dtype(llama):
    measure_speed({"one": llama.to(torch.bfloat16)})
    assert llama.dtype == torch.bfloat16
