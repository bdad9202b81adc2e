"""Two photographs exchange their colours by optimal transport: `python colour_transfer.py [OUT.png OUT.png]`.

Random pixels of both are matched by an entropic plan. Its potentials extend the match to all pixels: a colour z goes to the
mean of the other photograph's colours y_j with weights exp(g_j - |z - y_j|^2 / reg), which is attention with queries z,
keys and values y. Data: scikit-learn's sample photographs. About 5 s.
"""

import sys

import torch
from matplotlib.image import imsave
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from dither import noise, transport

PIXELS, REG = 2000, 2e-3

photos = [torch.tensor(photo) / 255 for photo in load_sample_images().images]  # [427, 640, 3]
flat = [photo.flatten(0, 1) for photo in photos]


def sample(which: int, count: int, stream: int) -> torch.Tensor:
    return flat[which][noise.randint(0, len(flat[which]), count, seed=0, stream=stream)]


def transfer(pixels: torch.Tensor, y: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    bias = (g - y.double().square().sum(1) / REG).float().expand(1, 1, len(pixels), -1)
    z, y = pixels[None, None], y[None, None]
    return F.scaled_dot_product_attention(z, y, y, attn_mask=bias, scale=2 / REG)[0, 0].clamp(0, 1)


x, y = sample(0, PIXELS, 0), sample(1, PIXELS, 1)
plan = transport.solve(None, None, transport.PointCloud(x, y), REG, tol=1e-4)
f, g = plan.potentials
print(f"{plan.status} after {plan.iterations} iterations and {plan.newton_steps} Newton steps, error {plan.error:.0e}")

moved = transfer(flat[0], y, g), transfer(flat[1], x, f)
for i, name in enumerate(("china", "flower")):
    goal, chosen = sample(1 - i, 20_000, 2), noise.randint(0, len(flat[i]), 20_000, seed=0, stream=3)
    before, after = (transport.sliced_wasserstein_distance(z[chosen], goal, seed=0) for z in (flat[i], moved[i]))
    print(f"{name}: sliced distance from the colours of the other from {before:.3f} to {after:.3f}")
for path, colours, photo in zip(sys.argv[1:] or ("china.png", "flower.png"), moved, photos):
    imsave(path, colours.view(photo.shape).numpy())
