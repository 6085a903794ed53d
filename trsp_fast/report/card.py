"""README.md of a pruned checkpoint: its model card, from the numbers of report.json."""

from pathlib import Path
from typing import Any

import yaml

from trsp_fast.report.html import figure_text, headline, licence_text, size_text
from trsp_fast.report.run_plots import PERPLEXITIES

_PAPER = "[arXiv 2505.18232](https://arxiv.org/abs/2505.18232)"


def write_card(report: dict[str, Any], path: Path) -> None:
    """Front matter as the hub reads it, then what was removed, what it cost, what it gained, and how to repeat it."""
    sections = [
        _front_matter(report),
        f"# {_name(report)} without {len(report['removed_layers'])} of its {report['layers_before']} layers",
        headline(report)[0].upper() + headline(report)[1:],
        _layers(report),
        _perplexities(report),
        _size_and_speed(report),
        _proof(report),
        _loading(report),
        _again(report),
    ]
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def _front_matter(report: dict[str, Any]) -> str:
    fields = {"base_model": report["base_model"]} if report["base_model"] else {}
    fields |= report["license"]
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields |= {"tags": ["trsp_fast", "layer-pruning", "pruned"]}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _name(report: dict[str, Any]) -> str:
    return _text(report["base_model"] or report["model"])


def _layers(report: dict[str, Any]) -> str:
    how = {
        "given": "were named by hand",
        "trsp": f"were chosen by gates that learned (TRSP, stage 1, {_PAPER})",
    }.get(report["selection"]["method"], f"were chosen by `{report['selection']['method']}`")
    gone, tokens = ", ".join(map(str, report["removed_layers"])), report["tokens"]
    texts = [f"Layers {gone} of `{_text(report['model'])}` are gone. They {how}."]
    data = f" of `{_text(report['data'])}`" if report["data"] else ""
    if report["transfer"]:
        texts.append(
            f"Before the cut their knowledge was moved into the layers that stay (stage 2): "
            f"{tokens['trained_on']:,} tokens{data} were trained on{_replaced(tokens)}."
        )
    elif report["trained"] and report["config"]["select"].get("train_weights") and report["selection"]["rounds"]:
        windows = min(tokens["windows"], report["config"]["select"]["samples"] or tokens["windows"])
        learned = windows * tokens["seq_len"]
        texts.append(f"All weights learned together with the gates, on {learned:,} tokens{data}.")
    if report.get("fold"):
        texts.append("What they did was folded in closed form into projections of the layers that stay.")
    if not report["trained"]:
        texts.append("No weight was trained: the layers that stay have the bytes of the source.")
    texts.append(f"Calibration: {tokens['windows']:,} windows of {tokens['seq_len']:,} tokens{data}.")
    return " ".join(texts)


def _replaced(tokens: dict[str, Any]) -> str:
    share = tokens.get("replaced", 0.0)  # reports of version 0.1.0's first days have none
    return f", {share:.0%} of them replaced by others of it" if share else ""


def _perplexities(report: dict[str, Any]) -> str:
    found = report["perplexity"]
    rows = [f"| {text} | {figure_text(found[name])} |" for name, text in PERPLEXITIES.items() if name in found]
    if not rows:
        return "## Perplexity\n\nIt was not measured."
    data = f" of `{_text(report['evaluation_data'])}`" if report["evaluation_data"] else ""
    what = f"On {report['tokens']['evaluation']:,} tokens{data}, in windows of {report['tokens']['seq_len']:,}."
    return "\n".join(["## Perplexity", "", what, "", "| model | perplexity |", "|---|---|", *rows])


def _size_and_speed(report: dict[str, Any]) -> str:
    speed, size, parameters = report["speed"], report["weight_bytes"], report["parameters"]
    rows = [
        f"| layers | {report['layers_before']} | {report['layers_after']} |",
        f"| parameters | {parameters['dense']:,} | {parameters['pruned']:,} |",
        f"| weights | {size_text(size['dense'])} | {size_text(size['pruned'])} |",
    ]
    if not speed:  # divided weights are not measured
        return "\n".join(["## Size", "", "| | before | after |", "|---|---|---|", *rows])
    for key, text in (("prompt", "reading a prompt, tokens/s"), ("generated", "generating, tokens/s")):
        before, after = (speed[model][f"{key}_tokens_per_second"] for model in ("dense", "pruned"))
        rows.append(f"| {text} | {figure_text(before, 0)} | {figure_text(after, 0)} |")
    where = f"Speed on {report['run']['device']} in {report['run']['dtype']}, both models in turn in one process."
    return "\n".join(["## Size and speed", "", "| | before | after |", "|---|---|---|", *rows, "", where])


def _proof(report: dict[str, Any]) -> str:
    rows = [
        f"| {check['name']} | {'yes' if check['passed'] else '**no**'} | {check['detail']} |"
        for check in report["checks"]
    ]
    return "\n".join(["## Proof of the export", "", "| check | holds | figure |", "|---|---|---|", *rows])


def _loading(report: dict[str, Any]) -> str:
    code = "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ]
    )
    licence = licence_text(report["license"])
    source = "" if licence == "unknown" else ", carried over from the source"
    return (
        f"## How to load it\n\n```python\n{code}\n```\n\nFOLDER is the one that this file is in. It is an ordinary "
        f"checkpoint: nothing of trsp_fast is needed to use it.\n\nLicence: {_text(licence)}{source}."
    )


def _again(report: dict[str, Any]) -> str:
    command = report["command"] or "trsp_fast.prune(model, tokens, TRSPConfig.from_dict(config))  # config: report.json"
    fence = "`" * (_longest_run(command) + 3)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    figures = "All figures: `report.json`, `report.html`."
    return f"## How to repeat it\n\n{fence}\n{command}\n{fence}\n\n{versions}. {figures}"


def _text(name: str) -> str:
    """A name as it may stand in Markdown, also inside a code span."""
    return " ".join(name.replace("`", "'").replace("<", "&lt;").split())


def _longest_run(text: str) -> int:
    """Backticks in a row, at most."""
    return max(map(len, "".join(c if c == "`" else " " for c in text).split()), default=0)
