"""Figures of transport: how fast solvers converge, and where a plan moves mass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._checks import instance, integer, number
from .._extras import require
from .costs import as_tensor
from .solve import Transport


def draw_convergence(
    results: Mapping[str, Transport], path: str | Path | None = None, *, tol: float | None = None, problem: int = 0
) -> Any:
    """Draw the L1 error of the marginals against iterations, a line for each result; returns the matplotlib figure.

    Args:
        results: of `solve`, by what the legend calls them. An iteration is one of Sinkhorn's or a step of Newton; where Newton
            follows a path, the error is that of the level of reg it is on.
        path: of a PNG to write. tol: a line to draw. problem: which of a batch.
    """
    owner = "draw_convergence"
    instance(owner, "results", results, Mapping, "a mapping from names to results of solve")
    if not results:
        raise ValueError(f"{owner}: results is empty, expected at least one")
    for name, result in results.items():
        instance(owner, f"results[{name!r}]", result, Transport, "a result of solve")
        if not 0 <= integer(owner, "problem", problem) < len(result.history):
            raise ValueError(f"{owner}: problem is {problem}, expected less than {len(result.history)} for {name!r}")
    plt = require("matplotlib.pyplot", extra="demo")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, result in results.items():
        errors = result.history[problem]
        axes.loglog(range(1, 1 + len(errors)), errors, marker="." if len(errors) < 60 else None, label=name)
    if tol is not None:
        axes.axhline(number(owner, "tol", tol, above=0), color="grey", linestyle=":")
    axes.set_xlabel("iteration")
    axes.set_ylabel("L1 error of the marginals")
    axes.legend(frameon=False)
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def draw_plan(
    plan: Any,
    path: str | Path | None = None,
    *,
    x: Any = None,
    y: Any = None,
    lines: int = 500,
) -> Any:
    """Draw a plan as a matrix, or, with points of the plane, as lines between them; returns the matplotlib figure.

    Args:
        plan: a result of `solve` without a batch, or a matrix [n, m], finite and not negative. path: of a PNG to write.
            All may be tensors or numpy arrays.
        x: points [n, 2]. y: points [m, 2]. lines: how many of the plan's largest entries are drawn, darker for more mass.
    """
    owner = "draw_plan"
    p = as_tensor(owner, "plan", plan.plan if isinstance(plan, Transport) else plan).detach().double().cpu()
    if p.dim() != 2:
        raise ValueError(f"{owner}: plan has shape {list(p.shape)}, expected [n, m]")
    if not bool(((p >= 0) & (p < torch.inf)).all()):
        raise ValueError(f"{owner}: plan contains {float(p[~((p >= 0) & (p < torch.inf))][0]):g}, expected finite masses >= 0")
    if (x is None) != (y is None):
        raise ValueError(f"{owner}: {'x' if x is None else 'y'} is None, expected points like {'y' if x is None else 'x'}")
    integer(owner, "lines", lines, 1)
    for name, points, n in (("x", x, p.shape[0]), ("y", y, p.shape[1])):
        if points is None:
            continue
        t = as_tensor(owner, name, points)
        if t.shape != (n, 2):
            raise ValueError(f"{owner}: {name} has shape {list(t.shape)}, expected {[n, 2]}")
    plt = require("matplotlib.pyplot", extra="demo")
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    if x is None or y is None:
        axes.imshow(p, cmap="Greys", interpolation="nearest", aspect="auto")
        axes.set_xlabel("j")
        axes.set_ylabel("i")
    else:
        collections = require("matplotlib.collections", extra="demo")
        source, target = (as_tensor(owner, name, t).detach().double().cpu() for name, t in (("x", x), ("y", y)))
        mass, where = p.flatten().topk(min(lines, p.numel()))
        mass, where = mass[mass > 0], where[mass > 0]
        ends = torch.stack([source[where // p.shape[1]], target[where % p.shape[1]]], 1)
        shades = (mass / mass.max()).tolist() if len(mass) else []
        axes.add_collection(collections.LineCollection(ends.numpy(), colors="black", alpha=shades or None, linewidths=0.7))
        axes.scatter(*source.T, s=12, label="x", zorder=2)
        axes.scatter(*target.T, s=12, label="y", zorder=2)
        axes.legend(frameon=False)
        axes.set_aspect("equal")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
