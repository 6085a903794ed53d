"""The documentation without its generator: links, the table of contents, names and paths that it speaks of."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchor(heading):
    """As Markdown's table of contents and GitHub make it."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def anchors(path):
    return {anchor(line.lstrip("# ")) for line in CODE.sub("", path.read_text()).splitlines() if line.startswith("#")}


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: path.name)
def test_every_link_resolves(page):
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        name, _, place = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        if page in PAGES:
            assert ROOT / "docs" in target.parents, f"{link}: the built site holds only docs/"
        if place:
            assert place in anchors(target), link


def test_the_table_of_contents_has_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    wanted, listed = {path.name for path in PAGES}, {name for entry in site["nav"] for name in entry.values()}
    assert wanted == listed


def test_the_api_page_names_what_there_is():
    found = re.findall(
        r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?", (ROOT / "docs/api.md").read_text(), re.M
    )
    assert len(found) > 10
    named = set()
    for module, members in found:
        for member in members.split(", ") if members else []:
            assert getattr(importlib.import_module(module), member).__doc__, f"{module}.{member}"
            named.add(member)
    public = set(importlib.import_module("trsp_fast").__all__) - {"__version__", "UserError", "CheckFailed"}
    assert public <= named  # the errors are a module of their own


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_paths_that_are_spoken_of_exist(page):
    for path in re.findall(r"\b((?:bench|examples|tests|trsp_fast)/[\w/]+\.(?:py|sh|json))\b", page.read_text()):
        assert (ROOT / path).exists(), path
