"""Noise that rows of a table catch up on when they are read (LazyDP, Lim et al. 2024), in plain torch.

A step of SGD on a row w and its momentum m is affine in (w, m), its noise is normal; so is a run of steps:

    w += ww w + wm m + noise,   m = mw w + mm m + noise,   the noise of covariance [[vw, vc], [vc, vm]]

and a run is seven numbers, in this order (without momentum two: ww, vw). `history` holds the run of `count` steps that begins
at step number first + begin in its row 2 begin + count - 1, where count is a power of 2 and begin a multiple of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import noise

Run = tuple[float, float, float, float, float, float, float]
NOTHING: Run = (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)


def then(x: Run, y: Run) -> Run:
    """The run x, and after it y."""
    ww, wm, mw, mm, vw, vc, vm = x
    a, b, c, d = 1 + y[0], y[1], y[2], y[3]
    p, q, r, s = a * vw + b * vc, a * vc + b * vm, c * vw + d * vc, c * vc + d * vm
    return (
        ww + y[0] + y[0] * ww + b * mw,
        a * wm + b * mm,
        c * (1 + ww) + d * mw,
        c * wm + d * mm,
        a * p + b * q + y[4],
        c * p + d * q + y[5],
        c * r + d * s + y[6],
    )


def _run(row: Sequence[float]) -> Run:
    return tuple(row) if len(row) == 7 else (row[0], 0.0, 0.0, 0.0, row[1], 0.0, 0.0)  # type: ignore[return-value]


def lazy_append_(history: Tensor, at: int, step: Sequence[float]) -> None:
    """`dither::lazy_append_`: the step number first + `at`, and all runs that it completes."""
    width, last, count = history.shape[1], _run(step), 1
    history[2 * at] = history.new_tensor(step)
    while (at + 1) % (2 * count) == 0:
        begin = at + 1 - 2 * count
        last = then(_run(history[2 * begin + count - 1].tolist()), last)
        count *= 2
        history[2 * begin + count - 1] = history.new_tensor(last if width == 7 else (last[0], last[4]))


def _draws(shape: Sequence[int], ids: list[int], double: bool, key: Sequence[int], where: tuple[int, int, int]) -> Tensor:
    """Standard normals of the rows `ids` of a table of that shape; where: stream, step, first element."""
    stream, step, start = where
    n = shape[1]
    z = [noise.draw("normal", n, [0.0, 1.0], [], key, stream, step, start + row * n, double) for row in ids]
    return torch.stack([torch.from_numpy(each) for each in z])


def _moves(runs: list[Run], last: Tensor, first: int, until: int, every: bool) -> Iterator[tuple[Run, bool, int, list[int]]]:
    """What rows that have made last[i] steps are moved by until they have made `until`: a run, whether it is a single step,
    the step that addresses its normals, and the places of the rows in `last`."""
    made = [max(v, first) for v in last.tolist()]
    if every:
        for step in range(min(made, default=until), until):
            yield runs[step - first], True, step, [i for i, v in enumerate(made) if v <= step]
        return
    run = NOTHING
    for step in range(until - 1, min(made, default=until) - 1, -1):
        run = then(runs[step - first], run) if step < until - 1 else runs[step - first]
        places = [i for i, v in enumerate(made) if v == step]
        if places:
            yield run, step == until - 1, until - 1, places


def lazy_rows_(
    weight: Tensor,
    momentum: Tensor | None,
    last: Tensor,
    ids: Tensor | None,
    gradient: Tensor | None,
    pull: Sequence[float],
    history: Tensor,
    first: int,
    steps: int,
    every: bool,
    key: Sequence[int],
    stream: int,
) -> None:
    """`dither::lazy_rows_` where no kernel is available: rows move from the steps that they have made, `last`, to `steps`.

    The last of these steps has a gradient, if one is given: of 1 it adds pull[0] to w and pull[1] to m. The draw at step s of a
    row moves it to s + 1 steps; a run of several draws twice, for m and for the part of w that does not depend on m.
    """
    rows = list(range(weight.shape[0])) if ids is None else ids.tolist()
    where = {row: i for i, row in reversed(list(enumerate(rows)))}  # the first of repeated ones
    places = [i for i, row in enumerate(rows) if where[row] == i and last[row] < steps]
    rows = [rows[i] for i in places]
    if not rows:
        return
    index = torch.tensor(rows, device=weight.device)
    until = steps - 1 if gradient is not None else steps
    runs = [_run(row) for row in history[0 : 2 * (steps - first) : 2].tolist()]
    second = -(-weight.numel() // 256) * 256

    def move(run: Run, single: bool, step: int, which: list[int], g: Tensor | None) -> None:
        ww, wm, mw, mm, vw, vc, vm = run
        at = index[which]
        w = weight[at]
        m = torch.zeros_like(w) if momentum is None else momentum[at]
        nm = math.sqrt(vm)
        nw = -math.sqrt(vw) if single or nm == 0 else vc / nm
        rest = 0.0 if single or nm == 0 else max(vw - nw * nw, 0.0)
        double = weight.dtype == torch.float64
        chosen = [rows[i] for i in which]
        z = _draws(weight.shape, chosen, double, key, (stream, step, 0)).to(w)
        added = nw * z
        if rest > 0:
            added = added + math.sqrt(rest) * _draws(weight.shape, chosen, double, key, (stream, step, second)).to(w)
        moved_w, moved_m = ww * w + wm * m, mw * w + mm * m + nm * z
        if g is not None:
            moved_w, moved_m = moved_w + pull[0] * g, moved_m + pull[1] * g
        weight[at] = w + (moved_w + added)
        if momentum is not None:
            momentum[at] = moved_m

    for run, single, step, which in _moves(runs, last[index], first, until, every):
        move(run, single, step, which, None)
    if gradient is not None:
        move(runs[until - first], True, until, list(range(len(rows))), gradient[torch.tensor(places, device=weight.device)])
    last[index] = steps
