"""Two photographs exchange their colours by optimal transport: `python colour_transfer.py [OUT.png OUT.png]`.

Random pixels of both are matched by an entropic plan. Its barycentric map extends the match to all pixels: a colour z goes to
the mean of the other photograph's colours y_j with weights exp(g_j - |z - y_j|^2 / reg). Data: scikit-learn's sample
photographs. About 5 s.
"""

import sys

import torch
from matplotlib.image import imsave
from sklearn.datasets import load_sample_images

from dither import noise, transport

PIXELS, REG = 2000, 2e-3

photos = [torch.tensor(photo) / 255 for photo in load_sample_images().images]  # [427, 640, 3]
flat = [photo.flatten(0, 1) for photo in photos]


def sample(which: int, count: int, stream: int) -> torch.Tensor:
    return flat[which][noise.randint(0, len(flat[which]), count, seed=0, stream=stream)]


x, y = sample(0, PIXELS, 0), sample(1, PIXELS, 1)
plan = transport.solve(None, None, transport.PointCloud(x, y), REG, tol=1e-4)
print(f"{plan.status} after {plan.iterations} iterations and {plan.newton_steps} Newton steps, error {plan.error:.0e}")

moved = plan.barycentric_map(flat[0]).clamp(0, 1), plan.barycentric_map(flat[1], inverse=True).clamp(0, 1)
for i, name in enumerate(("china", "flower")):
    goal, chosen = sample(1 - i, 20_000, 2), noise.randint(0, len(flat[i]), 20_000, seed=0, stream=3)
    before, after = (transport.sliced_wasserstein_distance(z[chosen], goal, seed=0) for z in (flat[i], moved[i]))
    print(f"{name}: sliced distance from the colours of the other from {before:.3f} to {after:.3f}")
for path, colours, photo in zip(sys.argv[1:] or ("china.png", "flower.png"), moved, photos):
    imsave(path, colours.view(photo.shape).numpy())
