"""Whether the CPU and the GPU of this machine give the same bits, on sizes that the tests have no time for.

python bench/compare_bits.py [--device cuda]; the exit status counts the differences.
"""

import argparse
import sys

import torch

from dither import noise, ops, optim, sampling, sparsity, tokens
from dither.privacy import kernels

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


BATCHES = ((8, 1, 784, 512), (32, 64, 128, 384), (5, 33, 65, 7), (2, 300, 40, 1000))  # samples, steps, inputs, outputs
CONVOLUTIONS = (  # samples, channels, outputs, side, kernel, stride, padding, dilation, groups
    (64, 1, 16, 28, 3, 1, 1, 1, 1),
    (64, 16, 32, 14, 3, 1, 1, 1, 1),
    (7, 12, 18, 33, 5, 2, 3, 2, 3),
    (3, 64, 96, 9, 1, 1, 0, 1, 1),
)


def normal(seed, dtype, device, *shape):
    return noise.normal(shape, seed=seed).to(device, dtype)


def norms_of_samples(dtype, device):
    """Squared norms of gradients, of linear maps and embeddings; with an infinite sample."""
    made = []
    for seed, (batch, steps, inputs, outputs) in enumerate(BATCHES):
        a, g = normal(2 * seed, dtype, device, batch, steps, inputs), normal(2 * seed + 1, dtype, device, batch, steps, outputs)
        a.view(-1)[-1] = float("inf")
        ids = noise.randint(0, 20, (batch, steps), seed=seed).to(device)
        for add, *given in (
            *((kernels.add_ghost_norm, a, g, bias) for bias in (False, True)),
            *((kernels.add_squares, x) for x in (a, g)),
            *((kernels.add_embedding_norm, ids, g, padding) for padding in (-1, 3)),
        ):
            out = torch.zeros(batch, dtype=torch.float64, device=device)
            add(out, *given)
            made.append(out)
    return made


def scaled_samples(dtype, device):
    x = normal(1, dtype, device, 33, 100_003)
    factor = noise.uniform(33, seed=2).to(device)
    x[5], factor[5] = float("nan"), 0
    return [kernels.scaled(x, factor)]


def convolved(dtype, device):
    """Gradients of convolutions, one for each sample."""
    made = []
    for seed, (batch, channels, outputs, side, k, *rest, groups) in enumerate(CONVOLUTIONS):
        stride, padding, dilation = ((n, n) for n in rest)
        reach = rest[2] * (k - 1) + 1
        places = (side + 2 * rest[1] - reach) // rest[0] + 1
        x = normal(2 * seed, dtype, device, batch, channels, side, side)
        g = normal(2 * seed + 1, dtype, device, batch, outputs, places, places)
        size = (outputs, channels // groups, k, k)
        made.append(kernels.conv_gradients(x, g, size, stride, padding, dilation, groups))
    return made


def sampled(dtype, device):
    """Steps of samplers with coefficients of every kind, inner products and quantiles."""
    shape = samples, n = 3, 333_337
    x = [normal(1, dtype, device, *shape), normal(2, torch.float32, device, *shape)]
    seeds, limit = torch.arange(samples).to(device), noise.uniform(samples, seed=3).to(device) + 1
    mask = noise.uniform(n, seed=4).to(device)
    made = []
    for by, size in ((0, (1, 4, 4)), (1, (samples, 4, 4)), (2, (4, 4, n))):
        table = noise.normal(size, seed=5, dtype=torch.float64).to("cpu" if by == 0 else device)
        out = [torch.empty_like(t) for t in x]
        ops.write("rows_", out, out, x, table, 0, by, seeds, 7, limit, True, mask)
        made += out
    gram = torch.empty(samples, 2, 3, dtype=torch.float64, device=device)
    ops.write("gram_", gram, gram, x)
    quantile = torch.empty(samples, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    ops.write("quantile_", quantile, quantile, x[0], 0.995)
    return [*made, gram, quantile]


def chosen(dtype, device):
    """Tokens that are kept, matched and merged."""
    x = normal(1, dtype, device, 2, 1024, 320)
    scores = normal(2, torch.float32, device, 2, 1024)
    plan, kept = tokens.tomesd_plan(x, 0.5, 32, 32), tokens.topk_tokens(scores, 300)
    merged = tokens.merge(x, plan)
    return [
        kept,
        tokens.gather_tokens(x, kept),
        *tokens.bipartite_match(x[:, ::2], x[:, 1::2]),
        merged,
        tokens.unmerge(merged, plan),
    ]


def runs(name, options, device):
    """A whole run of a sampler, of a model without rounding of its own."""
    x = normal(1, torch.float32, device, 3, 4, 16, 16)
    return [sampling.sample(lambda x, time: 0.5 * x, x, sampler=name, seed=[4, 9, 2], **{"steps": 10, **options})]


SPECIAL = {"dpm_solver_v3", "mean_reverting", "rddm", "sgmse"}  # want statistics, registers or a process of their own
OPTIONS = {
    "annealed_langevin": {"process": "ve"},
    "dpm_solver": {"process": "ve", "grid": [8.0, 4.0, 2.0, 1.0, 0.5], "steps": None},
    "euler_ancestral_rf": {"process": "flow"},
    "reverse_diffusion": {"process": "ve"},
}


def released(make, engine, dtype, device):
    """Three steps with private noise."""
    params = [noise.normal(n, seed=i).to(device, dtype).requires_grad_() for i, n in enumerate((1_000_003, 77_777, 5))]
    optimizer = make(params, lr=1e-2)
    seed = bytes(range(32)) if engine == "chacha20" else 11
    optimizer._set_private_noise(optim.PrivateNoise(seed, engine, 2**31), std=1.1, scale=1 / 256)
    for t in range(3):
        for i, p in enumerate(params):
            p.grad = noise.normal(p.shape, seed=100 + i, step=t).to(device, dtype)
        optimizer.step()
    return params


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
    for dtype in FLOATS:
        for run in (norms_of_samples, scaled_samples, convolved, sampled, chosen):
            subjects[f"{run.__name__.replace('_', ' ')}, {dtype}"] = run, dtype
    for name in sampling.SAMPLERS:
        if name not in SPECIAL:
            subjects[f"run of {name}"] = runs, name, OPTIONS.get(name, {})
    for make in (optim.SGD, optim.AdamW):
        for engine in ("chacha20", "philox"):
            for dtype in (torch.float32, torch.float64):
                subjects[f"{make.__name__}, private noise, {engine}, {dtype}"] = released, make, engine, dtype
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
