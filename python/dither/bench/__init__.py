"""Microbenchmarks of the kernels: `python -m dither bench`.

A family is a module of this package with a function `cases(setting)`; `_FAMILIES` lists them.
"""

from __future__ import annotations

import gc
import importlib
from pathlib import Path

import torch

from .measure import Case, Contest, Setting, measure
from .report import Report

_FAMILIES = ("noise", "optim", "sparsity", "privacy", "tokens", "token_merging", "transport", "sliced", "sampling")


def main(
    families: list[str],
    json: Path | None = None,
    markdown: Path | None = None,
    quick: bool = False,
    device: str | None = None,
    threads: int | None = None,
) -> Report:
    """Measure all cases of some families (default: all), print each as it is done, and write JSON and Markdown
    after each family.

    `quick` takes a tenth of the data and three rounds: enough to see that everything runs, too little to quote.
    """
    for name in families:
        if name not in _FAMILIES:
            raise ValueError(f"family is {name!r}, expected one of {', '.join(_FAMILIES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', expected 'cpu': torch finds no GPU")
    for path in (json, markdown):
        if path:  # fails now rather than after minutes
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        setting = Setting(torch.device(device or "cpu"), quick, torch.get_num_threads())
        report = Report(setting)
        for name in families or _FAMILIES:
            family = importlib.import_module(f"{__name__}.{name}")
            gc.freeze()  # collections after each row then look at what the rows made
            for case in family.cases(setting):
                report.add(measure(case, setting))
            if json:
                report.write_json(json)
            if markdown:
                report.write_markdown(markdown)
    finally:
        gc.unfreeze()
        torch.set_num_threads(before)
    return report


__all__ = ["Case", "Contest", "Report", "Setting", "main", "measure"]
