"""compare: arms differ in what they say they do and in nothing else; rows, sentences and pages say what was found."""

import copy
import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from tiny import tiny_llama

from trsp_fast import laco
from trsp_fast.compare.arms import ARMS, CORE, chosen_arms
from trsp_fast.compare.output import compare_into
from trsp_fast.compare.runner import Comparer, layer_counts
from trsp_fast.config import TRSPConfig, merge
from trsp_fast.errors import Interrupted, UserError
from trsp_fast.models.gates import bypassed
from trsp_fast.report.comparison import markdown, sentences, summaries
from trsp_fast.report.perplexity import perplexity
from trsp_fast.run.events import Events
from trsp_fast.select import METHODS, choose_layers
from trsp_fast.transfer import transfer

QUICK = {"data": {"batch": 4}, "select": {"steps_per_round": 1, "shortlist": 2}, "transfer": {"epochs": 1, "lr": 2e-3}}
ABOUT = {
    "model": "tiny",
    "data": "random",
    "evaluation_data": None,
    "command": "trsp-fast compare",
    "versions": {"trsp_fast": "0", "torch": "0"},
}


def windows(seed):
    return torch.randint(0, 97, (8, 16), generator=torch.Generator().manual_seed(seed))


def comparer(model=None, events=None, **changes):
    config = TRSPConfig.from_dict({**QUICK, **changes})
    return Comparer(model or tiny_llama(), windows, windows(100), config, other=windows(200), events=events or Events())


# ---- arms


def test_core_is_what_the_readme_says_and_every_method_has_its_arms():
    assert [arm.name for arm in chosen_arms("core")] == ["dense", *CORE]
    assert [arm.name for arm in chosen_arms("core, trsp-fold")] == ["dense", *CORE, "trsp-fold"]
    assert {arm.name for arm in chosen_arms("all")} == set(ARMS)
    for method in METHODS:
        cut = {f"cut-{method}-{then}" for then in ("lm", "distill", "distill-noise")}
        assert cut | {"trsp-untrained" if method == "trsp" else method} <= set(ARMS)


def test_an_unknown_arm_is_refused():
    with pytest.raises(UserError, match="no arm 'cut-magic-lm'"):
        chosen_arms("trsp,cut-magic-lm")


@pytest.mark.parametrize("name", ARMS)
def test_all_arms_train_alike(name):
    """Same passes, optimiser, learning rate and clipping, whatever the arm changes."""
    base = TRSPConfig.from_dict({"num_layers": 2, "transfer": {"epochs": 5, "lr": 3e-3, "warmup": 0.3, "clip": 0.7}})
    config = ARMS[name].config(base, 7)
    for field in ("epochs", "lr", "warmup", "clip", "optimizer", "trainable"):
        assert getattr(config.transfer, field) == getattr(base.transfer, field)
    assert config.seed == 7
    assert config.data == base.data


def test_arms_say_what_is_minimised_and_when_layers_leave():
    base = TRSPConfig(num_layers=2)
    of = {name: ARMS[name].config(base, 0) for name in ARMS}
    assert of["trsp"].transfer == base.transfer
    assert (of["trsp-paper"].transfer.norm, of["trsp-l1"].transfer.norm) == ("l2", "l1")
    assert of["trsp-paper"].transfer.lambda2 > 0
    assert of["trsp-paper"].select.gate_mode == "output"
    assert of["trsp-oneshot"].select.schedule == "oneshot"
    cut, late = of["cut-sleb-lm"].transfer, of["lm-then-cut"].transfer
    assert (cut.objective, cut.gate, cut.hold, cut.lambda2, cut.hidden) == ("lm", "anneal", 1.0, 0.0, 0.0)
    assert (late.objective, late.gate, late.lambda2, late.hidden) == ("lm", "none", 0.0, 0.0)
    assert of["cut-sleb-distill"].transfer.objective == "distill"
    assert of["cut-sleb-distill"].transfer.hidden == 0.0
    assert of["cut-sleb-distill"].select.method == "sleb"
    assert of["cut-sleb-distill"].transfer.replaced == of["cut-sleb-lm"].transfer.replaced == 0.0
    noisy, plain = of["cut-sleb-distill-noise"].transfer, of["cut-sleb-distill"].transfer
    assert (noisy.replaced, noisy) == (base.transfer.noise, dataclasses.replace(plain, noise=base.transfer.noise))
    assert of["cut-sleb-imitate"].transfer == base.transfer


def test_rivals_have_one_rate_for_all_layers():
    base = TRSPConfig.from_dict({"num_layers": 1, "transfer": {"gap_lr": 3.0}})
    ours = {name for name, arm in ARMS.items() if arm.transfer is not None and arm.config(base, 0).transfer.gap_lr == 3}
    trained_as_ours = {"trsp", "trsp-oneshot", "trsp-judge-cut", "trsp-no-noise", "trsp-no-fold", "trsp-no-hidden"}
    assert {name for name in ours if name.startswith("trsp") and name != "trsp-fold"} == trained_as_ours
    assert all(name.startswith("trsp") or name.endswith(("-imitate", "-fold")) for name in ours)
    rest = [arm.config(base, 0).transfer.gap_lr for name, arm in ARMS.items() if arm.transfer and name not in ours]
    assert set(rest) == {1.0}


def test_the_parts_are_left_out_one_at_a_time():
    base = TRSPConfig(num_layers=2)
    for part, without in {"noise": 0.0, "fold": "none", "hidden": 0.0}.items():
        arm = next(arm for arm in chosen_arms("parts") if arm.name == f"trsp-no-{part}")
        assert arm.config(base, 0) == TRSPConfig.from_dict(merge(base.to_dict(), {"transfer": {part: without}}))
        assert arm.config(base, 0) != base
    even = next(arm for arm in chosen_arms("parts") if arm.name == "trsp-even-lr").config(base, 0)
    assert even == TRSPConfig.from_dict(merge(base.to_dict(), {"transfer": {"gap_lr": 1.0}})) != base
    judged_by_cut = TRSPConfig.from_dict(merge(base.to_dict(), {"select": {"judge": "cut"}}))
    assert next(arm for arm in chosen_arms("parts") if arm.name == "trsp-judge-cut").config(base, 0) == judged_by_cut
    assert judged_by_cut != base


# ---- rows


@pytest.fixture(scope="module")
def found():
    names = "trsp,trsp-paper,lm-then-cut,cut-shortgpt-distill,shortgpt,laco,dense-lm"
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    comparison = comparer(model).run(chosen_arms(names), [1, 2], [0, 1])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return comparison


def test_every_arm_has_a_row_per_seed_and_number(found):
    rows = {(row["arm"], row["seed"], row["removed"]) for row in found.rows}
    per_number = {
        (arm, s, n)
        for arm in ("trsp", "trsp-paper", "lm-then-cut", "cut-shortgpt-distill", "shortgpt", "laco")
        for s in (0, 1)
        for n in (1, 2)
    }
    assert rows == per_number | {(arm, s, 0) for arm in ("dense", "dense-lm") for s in (0, 1)}
    assert len(found.rows) == len(rows)
    for row in found.rows:
        assert len(row["layers"]) == (0 if row["arm"].startswith("dense") else row["removed"])
        trained = row["arm"] not in ("dense", "shortgpt", "laco")
        assert row["tokens"] == (8 * 16 if trained else 0)
        assert row["perplexity"] > 1
        assert row["perplexity_other"] > 1
        assert row["seconds"] == row["seconds_select"] + row["seconds_transfer"]


def row_of(found, arm, seed=0, removed=2):
    return next(row for row in found.rows if (row["arm"], row["seed"], row["removed"]) == (arm, seed, removed))


def test_a_row_is_what_its_parts_give_by_hand(found):
    """cut-shortgpt-distill: chosen, transferred and measured without compare."""
    model, config = (
        tiny_llama(),
        ARMS["cut-shortgpt-distill"].config(TRSPConfig.from_dict({**QUICK, "num_layers": 2}), 1),
    )
    layers = sorted(choose_layers(model, windows(1), config).layers)
    transfer(model, windows(1), layers, config)
    with bypassed(model, layers):
        expected = perplexity(model, windows(100)), perplexity(model, windows(200))
    row = row_of(found, "cut-shortgpt-distill", seed=1)
    assert row["layers"] == layers
    assert (row["perplexity"], row["perplexity_other"]) == pytest.approx(expected, rel=1e-6)


def test_untrained_and_merged_rows(found):
    model = tiny_llama()
    with bypassed(model, row_of(found, "shortgpt")["layers"]):
        assert row_of(found, "shortgpt")["perplexity"] == pytest.approx(perplexity(model, windows(100)))
    small, _ = laco.merge(model, 2, windows(0), at_once=2)
    assert row_of(found, "laco")["perplexity"] == pytest.approx(perplexity(small, windows(100)))
    assert row_of(found, "dense", removed=0)["perplexity"] == pytest.approx(perplexity(model, windows(100)))


def test_equal_choices_are_made_once(found):
    """trsp and lm-then-cut share theirs; trsp-paper has its own; shortgpt serves two arms."""
    assert len(found.choices) == 3 * 2 * 2
    assert row_of(found, "trsp")["layers"] == row_of(found, "lm-then-cut")["layers"]


def test_evidence_of_the_first_seed(found):
    paper = found.evidence["trsp-paper 2"]
    assert len(paper["gates"]) == 2 * 2  # rounds of one pass, two batches
    assert paper["gates"][-1].count(None) == 2  # the layer of round 1, and the last one: the paper's mode gives it none
    assert len(paper["similarity"]["before"]) == 6
    assert paper["similarity"]["before"] != paper["similarity"]["after"]
    assert found.evidence["shortgpt 2"]["similarity"]["before"] == found.evidence["shortgpt 2"]["similarity"]["after"]


def test_layer_counts():
    model = tiny_llama()
    assert layer_counts(model, [0.5, 0.34], [2]) == [2, 3]
    with pytest.raises(UserError, match="how much to remove"):
        layer_counts(model, [], [])
    with pytest.raises(UserError, match="comes to none"):
        layer_counts(model, [0.01], [])


def test_trained_stage_1_is_refused():
    with pytest.raises(UserError, match="train_weights"):
        comparer(select={"train_weights": True})


# ---- what is said


def rows(**perplexities):
    """Two seeds of each arm at 2 removed layers."""
    return [
        {
            "arm": arm.replace("_", "-"),
            "seed": seed,
            "removed": 2,
            "layers": [] if arm == "dense" else [1, 2],
            "perplexity": value,
            "perplexity_other": None,
            "tokens": 10,
            "seconds": 1.0,
            "seconds_transfer": 1.0,
            "window_forwards": 3,
        }
        for arm, values in perplexities.items()
        for seed, value in enumerate(values)
    ]


def test_the_winner_is_named_whoever_it_is():
    lost = " ".join(sentences(rows(dense=[5, 5], trsp=[12, 13], cut_sleb_lm=[11, 12], trsp_paper=[20, 20]), 12))
    assert "Lowest perplexity: cut-sleb-lm, 11.50 (11.00 to 12.00) (2 seeds)" in lost
    assert "trsp is worse with every seed than cut-sleb-lm (-1.00)" in lost
    assert "trsp is better with every seed than trsp-paper (+7.50)" in lost
    assert "trsp-paper, 20.00) loses to cutting first" in lost
    assert "overlaps over its seeds with cutting first" in " ".join(
        sentences(rows(trsp=[10, 10], cut_sleb_lm=[11, 12], trsp_paper=[9, 30]), 12)
    )
    one = " ".join(sentences(rows(trsp=[10], sleb=[11]), 12))
    assert "trsp is better than sleb" in one
    assert "every seed" not in one
    won = " ".join(sentences(rows(trsp=[10, 10], cut_sleb_lm=[11, 12], trsp_paper=[9, 9]), 12))
    assert "Lowest perplexity: trsp-paper" in won
    assert "beats cutting first" in won
    open_ = " ".join(sentences(rows(trsp=[10, 12], sleb=[11, 11]), 12))
    assert "trsp is neither better nor worse with every seed than sleb (+0.00)" in open_
    mostly = " ".join(sentences(rows(trsp=[10, 12], sleb=[12, 11.5]), 12))  # better on average, not with every seed
    assert "trsp is neither better nor worse with every seed than sleb (+0.75)" in mostly


def test_the_other_domain_is_paired_too():
    both = rows(trsp=[10, 11], sleb=[12, 14])
    for row, other in zip(both, (50, 60, 49, 61), strict=True):
        row["perplexity_other"] = other
    text = " ".join(sentences(both, 12))
    assert "On the other domain the lowest is trsp, 55.00 (50.00 to 60.00)" in text
    assert "There trsp is neither better nor worse with every seed than sleb (+0.00)" in text


def test_an_arm_that_cannot_be_run_does_not_stop_the_others(tmp_path):
    """LaCo cannot take out 4 of 6 layers here, a diverging arm has no result, and both are told of."""
    run = comparer(transfer={"lr": 1e30, "epochs": 4})
    found = run.run(chosen_arms("laco,cut-last-lm,last"), [4], [0])
    assert [row["arm"] for row in found.rows] == ["dense", "last"]
    assert [problem["arm"] for problem in found.problems] == ["laco", "cut-last-lm"]
    text = sentences(found.rows, 6, found.problems)
    assert any(line.startswith("No row: laco, 4 layers, seed 0: ") for line in text)
    before = len(found.rows) + len(found.problems)
    again = run.run(chosen_arms("laco,cut-last-lm,last"), [4], [0], found)
    assert len(again.rows) + len(again.problems) == before


def test_pairs_need_the_same_seeds():
    some = rows(trsp=[10, 11], sleb=[12, 14])[:3]  # trsp with two seeds, sleb with one
    assert next(s for s in summaries(some) if s.arm == "sleb").difference == (2, 2, 2)
    assert next(s for s in summaries(some[1:]) if s.arm == "sleb").difference is None


def test_the_layers_of_most_seeds_are_shown():
    some = rows(trsp=[10, 11, 12])
    some[0]["layers"] = [3, 4]
    (ours,) = summaries(some)
    assert (ours.layers, ours.other_layers) == ([1, 2], 1)


def test_another_domain_is_judged_only_where_every_arm_was():
    some = rows(dense=[5], trsp=[10], sleb=[12])
    for row, value in zip(some, (50.0, 70.0, 60.0), strict=True):
        row["perplexity_other"] = value
    text = " ".join(sentences(some, 12))
    assert "On the other domain the lowest is sleb, 60.00; trsp has 70.00, the unpruned model 50.00." in text
    some[2]["perplexity_other"] = None
    text = " ".join(sentences(some, 12))
    assert "other domain" not in text


def test_seconds_that_are_not_comparable_with_one_seed_are_not_compared():
    some = rows(trsp=[10, 11, 12], lm_then_cut=[11, 12, 13])
    assert "1.00 times as long" in sentences(some, 12)[-1]
    some[0]["seconds_transfer"] = None
    assert "times as long" not in " ".join(sentences(some, 12))


def test_a_range_that_prints_as_one_number_is_one():
    assert "trsp, 10.00 (2 seeds)" in sentences(rows(trsp=[10.001, 10.002]), 12)[0]


def test_older_files_count_the_unpruned_model_among_the_removed():
    some = rows(dense=[5], trsp=[10])
    some += [{**some[1], "removed": 3, "layers": [1, 2, 3]}]
    assert markdown(some, 12).count("| dense |") == 2


def test_markdown_has_a_line_per_arm(found):
    text = markdown(found.rows, 6)
    head = text.splitlines()[0]
    assert all(line.count("|") == head.count("|") for line in text.splitlines() if line.startswith("|"))
    assert sum(line.startswith("| laco") for line in text.splitlines()) == 2


def test_every_amount_has_its_own_table(found):
    problem = {"arm": "laco", "seed": 0, "removed": 2, "reason": "too few layers"}
    first, second = markdown(found.rows, 6, [problem]).split("**2 of 6")
    assert "**1 of 6" in first
    assert "No row" not in first
    assert "No row: laco, 2 layers, seed 0: too few layers." in second
    assert [line.count("| dense |") for line in first.splitlines()].count(1) == 2  # of both tables
    assert markdown([row for row in found.rows if not row["removed"]], 6).count("| dense |") == 1


# ---- on disk


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.remote = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.remote += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]


def test_a_comparison_is_written_with_plots_that_stand_alone(tmp_path):
    arms = chosen_arms("trsp,trsp-paper,lm-then-cut,laco")
    values = compare_into(tmp_path / "out", comparer(), arms, [1, 2], [0], ABOUT)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == json.loads(json.dumps(values))
    assert not (tmp_path / "out" / ".trsp" / "state").exists()
    text = (tmp_path / "out" / "comparison.html").read_text()
    page = Page(text)
    assert page.remote == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == page.tags.count("figure") >= 7
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"url\(#(?!(quality|seconds|strips|gates|similarity))", text)
    assert "#010203" not in text
    assert "currentColor" in text
    assert "| trsp " in (tmp_path / "out" / "comparison.md").read_text()


def test_a_killed_comparison_goes_on(tmp_path):
    arms, seen = chosen_arms("trsp,shortgpt"), []

    def killer(kind, values):
        if kind == "arm":
            seen.append(values["arm"])
        if kind == "arm_done" and values["arm"] == "trsp":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        compare_into(tmp_path / "out", comparer(events=Events(killer)), arms, [1], [0], ABOUT)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--resume"):
        compare_into(tmp_path / "out", comparer(), arms, [1], [0], ABOUT)
    other = copy.deepcopy(tiny_llama(seed=3))
    with pytest.raises(UserError, match="had another model; give the same"):
        compare_into(tmp_path / "out", comparer(other), arms, [1], [0], ABOUT, resume=True)
    again = []
    events = Events(lambda kind, values: again.append(values["arm"]) if kind == "arm" else None)
    values = compare_into(tmp_path / "out", comparer(events=events), arms, [1], [0], ABOUT, resume=True)
    assert seen == ["dense", "trsp"]
    assert again == ["trsp", "shortgpt"]  # the killed row had not been saved
    assert [row["arm"] for row in values["arms"]] == ["dense", "trsp", "shortgpt"]
