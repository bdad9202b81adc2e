"""A small diffusion model of handwritten digits, trained here, and what samplers make of it in few steps.

The network is preconditioned as EDM's (Karras et al. 2022). All samplers begin with the same noise; their error is the distance
to where the probability flow ends, found by 400 steps of Heun's method. Data: scikit-learn's digits, 8 x 8. About 20 s.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from dither import noise, sampling

STEPS, BATCH, SAMPLES, COUNTS, DEVIATION = 4000, 256, 256, (6, 10, 20, 40), 0.5

torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
digits = images.float() / 8 - 1
digits *= DEVIATION / digits.std()

net = nn.Sequential(nn.Linear(64 + 16 + 10, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))
frequencies = torch.logspace(-1, 1, 8)


def denoiser(x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    s, angles = sigma[:, None], sigma[:, None].log() / 4 * frequencies
    total = (s**2 + DEVIATION**2).sqrt()
    seen = torch.cat([x / total, angles.sin(), angles.cos(), nn.functional.one_hot(label, 10)], 1)
    return x * (DEVIATION / total) ** 2 + net(seen) * s * DEVIATION / total


optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
for step in range(STEPS):
    rows = noise.randint(0, len(digits), BATCH, seed=0, stream=1, step=step)
    sigma = (noise.normal(BATCH, seed=0, stream=2, step=step) * 1.2 - 1.2).exp()
    noisy = digits[rows] + sigma[:, None] * noise.normal((BATCH, 64), seed=0, stream=3, step=step)
    weight = (sigma**2 + DEVIATION**2) / (sigma * DEVIATION) ** 2
    loss = (weight[:, None] * (denoiser(noisy, sigma, labels[rows]) - digits[rows]) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
print(f"loss {loss.item():.3f} of {sum(p.numel() for p in net.parameters()):,} parameters")

label = torch.arange(SAMPLES) % 10
run = {"shape": (SAMPLES, 64), "process": "ve", "seed": 0, "arguments": {"label": label}}
run["grid_options"] = {"sigma_min": 0.01, "sigma_max": 20.0}
end = sampling.sample(denoiser, sampler="heun", steps=400, **run)
print("RMS distance to the end of the flow, by evaluations of the model:", *COUNTS)
for name in ("euler", "heun", "dpmpp_2m", "unipc"):
    each = 2 if name == "heun" else 1  # evaluations of a step
    found = [sampling.sample(denoiser, sampler=name, steps=count // each, **run) for count in COUNTS]
    print(f"{name:9}", *(f"{(x - end).square().mean().sqrt():.4f}" for x in found))
x = sampling.sample(denoiser, sampler="dpmpp_2m", steps=20, **run)
right = (labels[torch.cdist(x, digits).argmin(1)] == label).double().mean()
print(f"the nearest real digit has the label asked for: {100 * right:.1f} %")
for line in (x[:10] * 4.5 + 4.5).clamp(0, 9).int().view(10, 8, 8).transpose(0, 1).tolist():
    print("  ".join("".join(" .:-=+*#%@"[level] for level in levels) for levels in line))
