"""Every Python example of the pages and of the README runs, and prints what it says."""

import doctest
import pathlib
import re

import pytest
import torch

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
    sessions = [block for block in blocks(page) if block.startswith(">>>")]
    examples = doctest.DocTestParser().get_doctest("\n".join(sessions), {}, page.name, None, None)
    assert doctest.DocTestRunner().run(examples).failed == 0
    for block in blocks(page):
        if not block.startswith(">>>"):
            exec(compile(block, page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_privacy_is_documented():
    """Every public name, and every way of clipping."""
    from dither import privacy
    from dither.privacy.clipping import FACTORS

    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    records = {"Best", "ClippingBias", "Learning", "Phase", "PoissonLoader", "Steps"}  # what functions take and give
    assert {name for name in privacy.__all__ if not re.search(rf"\b{name}\b", text)} <= records
    assert all(f'| `"{name}"` |' in text for name in FACTORS)
