"""Whether the CPU and the GPU of this machine give the same bits, on sizes that the tests have no time for.

python bench/compare_bits.py [--device cuda]; the exit status counts the differences.
"""

import argparse
import sys

import torch

from dither import noise, optim, sparsity

NUMEL = 10_000_019
ADDRESS = {"seed": -5, "stream": 7, "step": 3, "start": 2**40 + 13}
DRAWS = {
    "normal": lambda x: noise.normal_(x, **ADDRESS),
    "normal ChaCha20": lambda x: noise.normal_(x, engine="chacha20", **ADDRESS),
    "add_normal": lambda x: noise.add_normal_(x, 0.1, **ADDRESS),
    "uniform": lambda x: noise.uniform_(x, -1, 3, **ADDRESS),
    "laplace": lambda x: noise.laplace_(x, **ADDRESS),
    "rademacher": lambda x: noise.rademacher_(x, **ADDRESS),
    "bernoulli": lambda x: noise.bernoulli_(x, 0.3, **ADDRESS),
}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RULES = {
    name: make
    for name, make in vars(optim).items()
    if isinstance(make, type) and issubclass(make, optim.FusedOptimizer) and make is not optim.FusedOptimizer
}
EXTRAS = {
    "plain": {},
    "all extras": {
        "max_norm": 100.0,
        "clip_value": 1.0,
        "grokfast_lamb": 1.5,
        "noise_eta": 0.01,
        "stochastic_rounding": True,
        "skip_nonfinite": True,
    },
}


def drawn(draw, dtype, device):
    x = torch.ones(NUMEL, dtype=dtype, device=device)
    draw(x)
    return [x]


def stepped(make, extras, dtype, device):
    """Parameters and states after five steps on a large, a ragged and a small tensor."""
    params = [noise.normal(n, seed=i).to(device, dtype).requires_grad_() for i, n in enumerate((1_000_003, 77_777, 5))]
    optimizer = make(params, lr=1e-2, seed=9, **extras)
    for t in range(5):
        for i, p in enumerate(params):
            p.grad = noise.normal(p.shape, seed=100 + i, step=t).to(device, dtype)
        optimizer.step()
    return [*params, *(v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))]


WEIGHTS = ((1024, 1024, -1), (96, 64, 3, 3, 1), (4096, 333, 0), (12, 1000, -1))  # shape and dimension


def pruned(n, m, dtype, device):
    """Masks, bits and decayed weights, with ties, NaN and infinities."""
    made = []
    for seed, (*shape, dim) in enumerate(WEIGHTS):
        w = (noise.normal(shape, seed=seed) * 8).round().div(8).to(device, dtype)
        w.view(-1)[::101], w.view(-1)[::103] = float("nan"), float("-inf")
        made += [sparsity.nm_mask(w, n, m, dim, pad=True), sparsity.nm_mask(w, n, m, dim, packed=True, pad=True)]
        made += [sparsity.nm_decay(w, n, m, beta, dim, pad=True) for beta in (0.0, 0.3)]
        made.append(sparsity.nm_mask(w, n, m, dim, factor=noise.uniform(w.shape[dim], seed=9).to(device), pad=True))
    w = noise.normal((512, 1028), seed=5).to(device, dtype)
    made += [sparsity.transposable_mask(w, method, packed=packed) for method in ("exact", "greedy") for packed in (False, True)]
    bits = sparsity.nm_mask(w, 2, 4, packed=True)
    made += [sparsity.masked(w, bits), sparsity.srste_grad_(noise.normal(w.shape, seed=6).to(device, dtype), w, bits, 0.1)]
    if dtype.itemsize == 2:
        packed = sparsity.pack24(w[:, :1024].contiguous())
        made += [*packed, sparsity.unpack24(*packed)]
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    subjects = {f"{name}, {dtype}": (drawn, draw, dtype) for name, draw in DRAWS.items() for dtype in FLOATS}
    for name, make in RULES.items():
        for extra, arguments in EXTRAS.items():
            subjects.update({f"{name}, {extra}, {dtype}": (stepped, make, arguments, dtype) for dtype in FLOATS})
    for n, m in ((2, 4), (1, 8), (8, 16), (16, 32)):
        subjects.update({f"{n}:{m}, {dtype}": (pruned, n, m, dtype) for dtype in FLOATS})
    wrong = 0
    for name, (run, *arguments) in subjects.items():
        different = 0
        for a, b in zip(run(*arguments, "cpu"), run(*arguments, device)):
            kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            different += int((a.detach().view(kind) != b.detach().cpu().view(kind)).sum())
        wrong += different > 0
        if different:
            print(f"{name}: {different} elements differ")
    print(f"{len(subjects)} comparisons of cpu with {device}, {wrong} with differences")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
