"""Guidance without a condition: digits learnt without their labels, led away from what worse attention makes of them.

The network is a small transformer of 2 x 2 patches, preconditioned as EDM's (Karras et al. 2022). In its last block attention
is the identity (PAG, Ahn et al. 2024), or its queries are their mean (SEG, Hong 2024). Of 360 samples each: the Sinkhorn
divergence to held-out digits; the entropy of a sample's class as a classifier of real digits sees it, in nats: the less, the
more of a digit; that of all classes together, 2.30 if they are even. Data: scikit-learn's digits, 8 x 8. About 20 s.
"""

import math

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from dither import noise, sampling, transport
from dither.sampling.guidance import Perturbed
from dither.sampling.interop import edm_denoiser

STEPS, BATCH, WIDTH, HEADS, BLOCKS, TRAIN = 600, 64, 48, 4, 3, 1077

torch.set_num_threads(1)
torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
order = torch.randperm(len(images))
pixels, labels = images[order].float().view(-1, 1, 8, 8) / 16, labels[order]
mean, std = pixels[:TRAIN].mean(), pixels[:TRAIN].std()
digits = (pixels - mean) / std


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.norm_mlp = Attention(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm_mlp(x))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(4, WIDTH), nn.Parameter(0.2 * torch.randn(16, WIDTH))
        self.level = nn.Sequential(nn.Linear(16, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        angles = level[:, None] * torch.arange(1, 9) * (math.pi / 4)
        level = self.level(torch.cat([angles.sin(), angles.cos()], 1))
        y = self.embed(F.pixel_unshuffle(x, 2).flatten(2).mT) + self.places + level[:, None]
        return F.pixel_shuffle(self.head(self.norm(self.blocks(y))).mT.unflatten(-1, (4, 4)), 2)


def train(model: nn.Module, steps: int, rate: float, loss) -> nn.Module:
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    return average.module.eval().requires_grad_(False)


def denoising(step: int) -> torch.Tensor:
    rows = noise.randint(0, TRAIN, BATCH, seed=0, stream=1, step=step)
    sigma = (noise.normal(BATCH, seed=0, stream=2, step=step) * 1.2 - 0.5).exp()
    s = sigma.view(-1, 1, 1, 1)
    noisy = digits[rows] + s * noise.normal((BATCH, 1, 8, 8), seed=0, stream=3, step=step)
    return ((1 + s**2) / s**2 * (edm_denoiser(network, 1.0)(noisy, sigma) - digits[rows]) ** 2).mean()


def recognition(step: int) -> torch.Tensor:
    rows = noise.randint(0, TRAIN, 128, seed=0, stream=4, step=step)
    noisy = digits[rows] + 0.3 * noise.normal((128, 1, 8, 8), seed=0, stream=5, step=step)
    return F.cross_entropy(classifier(noisy), labels[rows])


network = Network()
classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
model, seen = train(network, STEPS, 4e-3, denoising), train(classifier, 400, 5e-3, recognition)
right = (seen(digits[TRAIN:]).argmax(1) == labels[TRAIN:]).double().mean()
print(
    f"{sum(p.numel() for p in model.parameters()):,} parameters; the classifier is right for {100 * right:.1f} % of real digits"
)

real = pixels[TRAIN:].flatten(1).double()
reg = 0.05 * float(transport.PointCloud(real, real).matrix().mean())


def show(name: str, x: torch.Tensor) -> None:
    p = seen(x).softmax(1)
    each, all_ = (float(-torch.special.xlogy(q, q).sum(-1).mean()) for q in (p, p.mean(0)))
    near = float(transport.sinkhorn_divergence((x * std + mean).clamp(0, 1).flatten(1).double(), real, reg, tol=1e-3))
    print(f"{name:16} {near:10.3f} {each:10.3f} {all_:10.3f}")


print(f"{'':16} divergence each class all classes")
show("real digits", digits[:360])
guides = {"no guidance": None}
guides |= {f"PAG, scale {w}": Perturbed(w, "pag", module=model, blocks="blocks.2") for w in (0.25, 0.5, 1.0)}
guides["SEG, scale 2.0"] = Perturbed(2.0, "seg", sigma=math.inf, module=model, blocks="blocks.2")
grid = {"sigma_min": 0.03, "sigma_max": 20.0}
for name, guide in guides.items():
    x = sampling.sample(
        edm_denoiser(model, 1.0), shape=(360, 1, 8, 8), steps=15, process="ve", grid_options=grid, guidance=guide, seed=0
    )
    show(name, x)
