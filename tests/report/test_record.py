"""report.json, the plots made from it and the model card, of one run of a tiny model."""

import copy
import itertools
import json
import math
import re
import shutil
import subprocess

import pytest
import torch
import yaml
from pages import REPORT, Page
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

import trsp_fast as trsp
from trsp_fast.report.card import write_card
from trsp_fast.report.html import write_report
from trsp_fast.report.origin import front_matter, origin
from trsp_fast.report.record import POINTS, _plain, thinned
from trsp_fast.report.run_plots import perplexity_bars, run_plots
from trsp_fast.report.terminal import print_result
from trsp_fast.select.shortgpt import block_influence

CARD = "---\nlicense: other\nlicense_name: a-licence\nlicense_link: LICENSE\nlanguage: en\n---\n# A model\n"


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 97, (20, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokens):
    """(source folder, result, its folder) of a run with both stages."""
    folder = tmp_path_factory.mktemp("run")
    tiny_llama().save_pretrained(folder / "source")
    (folder / "source" / "README.md").write_text(CARD)
    model = AutoModelForCausalLM.from_pretrained(folder / "source")
    settings = {
        "preset": "two-stage",
        "num_layers": 2,
        "data": {"batch": 4},
        "select": {"steps_per_round": 2, "exchange": False},
        "transfer": {"epochs": 2, "noise": 0.1, "gap_lr": 4.0},
    }
    about = {"data": "text.txt", "evaluation_data": "the rest", "command": "trsp-fast prune `x` --num-layers 2"}
    config = trsp.TRSPConfig.from_dict(settings)
    result = trsp.prune(model, tokens, config, out=folder / "out", evaluation=tokens, about=about)
    return folder / "source", result, folder / "out"


def test_the_report_holds_the_histories_that_are_plotted(run):
    _, result, out = run
    report = json.loads((out / "report.json").read_text())
    assert report == result.report
    gates = [entry["gates"] for entry in report["selection"]["gates"]]
    assert gates == [entry["gates"] for entry in result.history["select"]]
    assert [entry["step"] for entry in report["selection"]["gates"]] == [0, 1, 2, 3]
    for name in ("loss", "lm_loss", "penalty", "hidden"):
        assert [step[name] for step in report["transfer"]] == [step[name] for step in result.history["transfer"]]


def test_similarity_is_that_of_the_untouched_and_of_the_trained_model(run, tokens):
    source, result, _ = run
    similarity = result.report["similarity"]
    untouched = AutoModelForCausalLM.from_pretrained(source)
    assert similarity["before"] == pytest.approx([1 - x for x in block_influence(untouched, tokens[:16])], abs=1e-6)
    assert len(similarity["after"]) == 6
    assert similarity["after"] != pytest.approx(similarity["before"], abs=1e-6)
    stays = [layer for layer in range(6) if layer not in result.removed_layers]
    pruned = [1 - x for x in block_influence(result.model, tokens[:16])]
    first = next(index for index, layer in enumerate(stays) if index != layer)  # up to here both are one computation
    assert [similarity["after"][layer] for layer in stays[:first]] == pytest.approx(pruned[:first], abs=1e-5)


def test_the_page_of_a_run_has_every_plot(run):
    _, result, out = run
    assert set(run_plots(result.report)) == {"perplexity", "gates", "losses", "distances", "similarity"}
    text = (out / "report.html").read_text()
    assert text.count("<svg") == 5
    page = Page()
    page.feed(text)
    words = " ".join(" ".join(page.text).split())
    assert "licence of the source: a-licence" in words
    assert (
        "next to a removed one learned at 4 times the learning rate, those three or more away at 0.25 times." in words
    )
    assert not re.search(r'(?:src|href)="(?!#)|@import|url\((?!#)', text)


def test_the_page_tells_what_the_race_of_each_round_found(run, tmp_path):
    _, result, out = run
    text = (out / "report.html").read_text()
    for entry in result.report["selection"]["rounds"]:
        assert entry["folded"] == []
        assert len(entry["judged"]) == 6 - entry["round"]
        for one in entry["judged"].values():
            assert f'<td class="n">{one["loss"]:.3f} ({one["windows"]})</td>' in text
    assert "Loss without each layer, and in brackets" in text
    folded = json.loads(json.dumps(result.report))
    for entry in folded["selection"]["rounds"]:
        entry["folded"] = [layer for layer in range(1, 6) if str(layer) in entry["judged"]]
    write_report(folded, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Loss without each layer, its work folded into the layer below, and in brackets" in text
    one = folded["selection"]["rounds"][0]["judged"]
    assert f"{one['0']['loss']:.3f}* ({one['0']['windows']})" in text
    assert f"{one['1']['loss']:.3f} ({one['1']['windows']})" in text


def test_an_exchange_is_told(run, tmp_path, capsys):
    report = json.loads(json.dumps(run[1].report))
    first, second = report["selection"]["rounds"][:2]
    close = next(layer for layer in first["judged"] if int(layer) not in report["removed_layers"])
    look = {name: first[name] for name in ("judged", "folded", "close")}
    looks = [
        {"position": 0, "layer": int(close), "instead_of": first["layer"], **look},
        {"position": 1, "layer": second["layer"], "instead_of": second["layer"], **look},
    ]
    report["selection"]["rounds"] += looks
    write_report(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert f"<td>{close} instead of {first['layer']}</td>" in text
    assert f"<td>{second['layer']} again</td>" in text
    assert "earlier choices were raced once more" in text
    assert text.count(f"<td>{first['layer']}</td>") == 2  # the race's table and the gates'
    print_result(report, tmp_path)
    found = first["judged"][close]
    row = next(line for line in capsys.readouterr().out.splitlines() if f"{close}, for {first['layer']} that" in line)
    assert f"{found['loss']:.3f}, {found['windows']} windows" in row
    assert "raced once more" not in (run[2] / "report.html").read_text()


def test_gates_that_are_told_before_their_only_step_are_not_drawn(run):
    """They are all 1; the table of rounds has what they came to."""
    report = json.loads(json.dumps(run[1].report))
    for entry in report["selection"]["gates"]:
        entry["gates"] = [None if value is None else 1.0 for value in entry["gates"]]
    assert "gates" not in run_plots(report)


def test_a_plot_shows_the_numbers_it_is_given():
    svg = perplexity_bars({"dense": 10.0, "cut": 4321.5, "pruned": None})
    assert "10.00" in svg
    assert "4,321.50" in svg
    assert "all layers on" not in svg


def test_plots_without_numbers_are_left_out():
    assert set(run_plots(REPORT)) == {"perplexity"}  # one step, no gates, no similarity
    steps = [{**REPORT["transfer"][0], "step": step, "D": {"1": None, "3": None}} for step in range(2)]
    assert set(run_plots({**REPORT, "transfer": steps, "perplexity": {}})) == {"losses"}


def test_long_histories_are_thinned_evenly():
    history = [{"step": step} for step in range(1000)]
    steps = [entry["step"] for entry in thinned(history)]
    assert (len(steps), steps[0], steps[-1]) == (POINTS, 0, 999)
    assert {later - step for step, later in itertools.pairwise(steps)} == {5, 6}
    assert thinned(history[:POINTS]) == history[:POINTS]


def test_what_is_not_finite_is_null():
    assert _plain({1: [math.nan, (1.5, -math.inf)], "x": True}) == {"1": [None, [1.5, None]], "x": True}


def test_a_step_that_was_not_finite_does_not_lose_the_run(tokens, tmp_path, monkeypatch):
    """One such step is not applied and the run goes on; JSON has no NaN."""
    import trsp_fast.pruner

    original = trsp_fast.pruner.transfer

    def diverging(*arguments, **options):
        history = original(*arguments, **options)
        history[0]["loss"] = math.nan
        return history

    monkeypatch.setattr("trsp_fast.pruner.transfer", diverging)
    config = trsp.TRSPConfig.from_dict({"layers": [2], "data": {"batch": 10}, "transfer": {"epochs": 1}})
    trsp.prune(tiny_llama(4), tokens, config, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["transfer"][0]["loss"] is None


def test_the_card_says_where_the_model_is_from_and_carries_the_licence_over(run):
    _, result, out = run
    card = (out / "README.md").read_text()
    values = front_matter(card.encode())
    assert values["base_model"] == "source"
    assert (values["license"], values["license_name"], values["license_link"]) == ("other", "a-licence", "LICENSE")
    assert (values["library_name"], values["pipeline_tag"]) == ("transformers", "text-generation")
    assert "trsp_fast" in values["tags"]
    assert "language" not in values
    for shown in (
        f"Layers {', '.join(map(str, result.removed_layers))} of",
        f"| the result | {result.perplexity['pruned']:,.2f} |",
        "export proven",
        "Licence: a-licence, carried over",
        "640 tokens of `text.txt` were trained on, 10% of them replaced by others of it.",
        "trsp-fast prune `x` --num-layers 2",
        f"torch {torch.__version__}",
        'AutoModelForCausalLM.from_pretrained("FOLDER"',
    ):
        assert shown in card, shown


def test_a_card_without_a_licence_says_so(run, tmp_path):
    _, result, _ = run
    write_card({**result.report, "license": {}, "base_model": None, "perplexity": {}}, tmp_path / "README.md")
    card = (tmp_path / "README.md").read_text()
    assert not {"license", "base_model"} & front_matter(card.encode()).keys()
    assert "Licence: unknown." in card
    assert "It was not measured." in card


def test_a_run_without_speed_has_a_page_and_a_card(run, tmp_path):
    """Weights that are divided among processes are not measured."""
    report = {**run[1].report, "speed": {}}
    write_card(report, tmp_path / "README.md")
    write_report(report, tmp_path / "report.html")
    for name in ("README.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "tokens/s" not in text
        assert f"{report['parameters']['pruned']:,}" in text


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("\ufeff---\r\nlicense: [mit, gpl-3.0]\r\n---\r\ntext", {"license": ["mit", "gpl-3.0"]}),
        ("---\nlicense: {a: b}\n---\n", {}),
        ("---\nlicense_name: alone\n---\n", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("---\n- a list\n---\n", {}),
        ("# no head\nlicense: mit\n", {}),
        ("---\nlicense: mit", {}),
        ("---\nlicense: " + "x" * 400 + "\n---\n", {}),
    ],
    ids=["plain", "list", "mapping", "name only", "not yaml", "no mapping", "no head", "no end", "too long"],
)
def test_licences_of_cards(tmp_path, card, licence):
    (tmp_path / "README.md").write_bytes(card.encode())
    config = tiny_llama(1).config
    config.name_or_path = str(tmp_path)
    assert origin(config) == {"base_model": tmp_path.name, "license": licence}


def test_a_licence_may_stand_in_the_configuration(tmp_path):
    config = tiny_llama(1, license="apache-2.0").config
    config.name_or_path = str(tmp_path)
    assert origin(config)["license"] == {"license": "apache-2.0"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert origin(config)["license"] == {"license": "mit"}


def test_a_model_of_the_hubs_cache_has_its_name_there(tmp_path):
    config = copy.deepcopy(tiny_llama(1).config)
    config.name_or_path = str(tmp_path / "models--org--a-model" / "snapshots" / "0123")
    (tmp_path / "models--org--a-model" / "snapshots" / "0123").mkdir(parents=True)
    assert origin(config)["base_model"] == "org/a-model"
    config.name_or_path = ""
    assert origin(config) == {"base_model": None, "license": {}}


def test_names_cannot_break_out_of_the_front_matter(run, tmp_path):
    _, result, _ = run
    name = "a: [b\n---\nlicense: mit"
    write_card({**result.report, "base_model": name, "license": {}}, tmp_path / "README.md")
    head = (tmp_path / "README.md").read_text().split("\n---\n")[0].removeprefix("---\n")
    assert yaml.safe_load(head)["base_model"] == name
    assert "license" not in yaml.safe_load(head)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FRAME = """<!doctype html><iframe id="f" src="report.html" style="border: 0; width: {width}px; height: 900px"></iframe>
<script>f.onload = () => {{ document.title = "width " + f.contentDocument.documentElement.scrollWidth; }}</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_scrolling_sideways(run, tmp_path, width):
    _, result, _ = run
    write_report({**result.report, "command": "trsp-fast prune " + "x" * 500}, tmp_path / "report.html")
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
    )
    command = [CHROMIUM, *options, "--virtual-time-budget=2000", "--dump-dom", tmp_path / "frame.html"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    seen = int(re.search(r"<title>width (\d+)</title>", shown.stdout)[1])
    assert width - 20 <= seen <= width
    assert "CONSOLE" not in shown.stderr
