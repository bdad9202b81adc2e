"""A run with gradient noise and stochastic rounding that is cut in two ends with the same bits as one that is not.

The noise of step t is a function of (seed, parameter, t), all of it in state_dict, so that there is no generator to save;
batches drawn by address need no sampler state either. Data: scikit-learn's digits. About 4 s.
"""

import io

import torch
from sklearn.datasets import load_digits
from torch import nn

import dither

torch.set_num_threads(1)  # the network is tiny
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images = (images / 16).bfloat16()


def start(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).bfloat16()
    return model, dither.optim.AdamW(model.parameters(), lr=1e-3, noise_eta=1e-4, stochastic_rounding=True, seed=seed)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        batch = dither.noise.randint(0, len(labels), 64, seed=0, stream=100, step=step)
        loss = nn.functional.cross_entropy(model(images[batch]).float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


whole, optimizer = start(seed=0)
train(whole, optimizer, 0, 400)

half, optimizer = start(seed=0)
train(half, optimizer, 0, 150)
checkpoint = io.BytesIO()
torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)

resumed, optimizer = start(seed=1)  # another process, another seed: the checkpoint brings its own
saved = torch.load(io.BytesIO(checkpoint.getvalue()))
resumed.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
torch.rand(1000)  # torch's generator may have gone anywhere
train(resumed, optimizer, 150, 400)

print(f"accuracy {100 * (whole(images).argmax(1) == labels).double().mean():.1f} %")
print("same bits after resuming:", torch.equal(weights(whole), weights(resumed)))
print("weights that differ from step 150:", f"{100 * (weights(whole) != weights(half)).double().mean():.0f} %")
