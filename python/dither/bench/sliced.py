"""Sliced Wasserstein distances and their gradients, against torch's sort and POT."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .. import transport
from .measure import Case, Contest, Setting, reading

SLICES = 64


def cases(setting: Setting) -> Iterator[Case]:
    equal = (1000, 64), (10000, 3), (10000, 64), (100000, 3)
    for n, m, d in (*((n, n, d) for n, d in equal), (1000, 1500, 64), (10000, 15000, 3)):
        n, m = (setting.scaled(10 * k) // 10 or 1 for k in (n, m))
        for name, backward in (("sliced Wasserstein", False), ("sliced Wasserstein and gradient", True)):
            yield Case("sliced", name, f"{n} and {m} x {d}, {SLICES} slices", partial(_sliced, setting, n, m, d, backward))


def _sliced(setting: Setting, n: int, m: int, d: int, backward: bool) -> Contest:
    X = torch.randn(n, d, device=setting.device, requires_grad=backward)
    Y = torch.randn(m, d, device=setting.device) + 1
    projections = transport.random_projections(d, SLICES, 0, device=setting.device)

    def eager() -> Tensor:
        u, v = ((x @ projections).T.sort(1).values for x in (X, Y))
        return (u - v).square().mean().sqrt()

    def run(distance: Callable[[], Tensor]) -> Callable[[], object]:
        return (lambda: torch.autograd.grad(distance(), X)) if backward else distance

    peers = {"torch": run(eager)} if n == m else {}
    if importlib.util.find_spec("ot"):
        import ot

        peers["POT"] = run(lambda: ot.sliced_wasserstein_distance(X, Y, projections=projections))
    projected = torch.empty(SLICES, n + m, device=setting.device)
    return Contest(
        run(lambda: transport.sliced_wasserstein_distance(X, Y, projections=projections)),  # type: ignore[arg-type,return-value]
        peers,
        bytes=projected.nbytes,
        elements=projected.numel(),
        roof=reading(projected),
    )
