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
    torch.manual_seed(0)
    sessions = [block for block in blocks(page) if block.startswith(">>>")]
    examples = doctest.DocTestParser().get_doctest("\n".join(sessions), {}, page.name, None, None)
    assert doctest.DocTestRunner().run(examples).failed == 0
    for block in blocks(page):
        if not block.startswith(">>>"):
            exec(compile(block, page.name, "exec"), {})
