"""Every Python example of the pages and of the README runs, and prints what it says."""

import doctest
import importlib
import pathlib
import re

import pytest
import torch

from dither import sampling

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def test_the_pages_have_examples():
    assert sum(len(blocks(page)) for page in PAGES) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_run(page):
    if page.name == "privacy.md":
        pytest.importorskip("dp_accounting")
    torch.manual_seed(0)
    kept = dict(sampling.SAMPLERS)  # one page adds a sampler
    sessions = [block for block in blocks(page) if block.startswith(">>>")]
    examples = doctest.DocTestParser().get_doctest("\n".join(sessions), {}, page.name, None, None)
    assert doctest.DocTestRunner().run(examples).failed == 0
    for block in blocks(page):
        if not block.startswith(">>>"):
            exec(compile(block, page.name, "exec"), {})
    sampling.SAMPLERS.clear()
    sampling.SAMPLERS.update(kept)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


RECORDS = {  # what functions take and give
    "privacy": {"Best", "ClippingBias", "Learning", "Phase", "PoissonLoader", "Steps"},
    "tokens": {"Attend", "Comparison", "Patch", "Record"},
    "transport": {"TwoSampleTest"},
}


@pytest.mark.parametrize("family", RECORDS)
def test_public_names_are_documented(family):
    module = importlib.import_module(f"dither.{family}")
    text = (ROOT / "docs" / f"{family}.md").read_text(encoding="utf-8")
    assert {name for name in module.__all__ if not re.search(rf"\b{name}\b", text)} <= RECORDS[family]
    ways = {"privacy": "clipping.FACTORS", "tokens": "patch.METHODS", "transport": "solve.METHODS"}[family].split(".")
    names = getattr(importlib.import_module(f"dither.{family}.{ways[0]}"), ways[1])
    assert all(re.search(rf'^\|.*`"{name}"`.*\|', text, re.M) for name in names)
