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
    "noise": {"Address", "key_of"},
    "optim": {"AdaMax", "Extras", "FusedOptimizer", "PrivateNoise", "pack_mask"},
    "privacy": {"Best", "ClippingBias", "Learning", "Phase", "PoissonLoader", "Steps"},
    "sampling": {"Program", "samplers_table"},
    "sparsity": set(),
    "tokens": {"Attend", "Comparison", "Patch", "Record"},
    "train": set(),
    "transport": {"TwoSampleTest"},
}
WAYS = {  # what is chosen by name, each a row of a table
    "privacy": ["clipping.FACTORS"],
    "sampling": ["sample.SAMPLERS", "named.PROCESSES", "grids.GRIDS"],
    "tokens": ["patch.METHODS"],
    "train": ["diffusion.WEIGHTINGS"],
    "transport": ["solve.METHODS"],
}


def names_of(module):
    """Its public ones; without __all__, those of dither that it defines or imports, but for modules."""
    own = (name for name, value in vars(module).items() if str(getattr(value, "__module__", "")).startswith("dither."))
    return getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]


@pytest.mark.parametrize("family", RECORDS)
def test_public_names_are_documented(family):
    module = importlib.import_module(f"dither.{family}")
    text = (ROOT / "docs" / f"{family}.md").read_text(encoding="utf-8")
    assert {name for name in names_of(module) if not re.search(rf"\b{name}\b", text)} <= RECORDS[family]


@pytest.mark.parametrize("way", [f"{family}.{way}" for family, ways in WAYS.items() for way in ways])
def test_ways_are_rows(way):
    family, room, table = way.split(".")
    text = (ROOT / "docs" / f"{family}.md").read_text(encoding="utf-8")
    names = getattr(importlib.import_module(f"dither.{family}.{room}"), table)
    assert not [name for name in names if not re.search(rf'^\|.*`"{name}"`.*\|', text, re.M)]
