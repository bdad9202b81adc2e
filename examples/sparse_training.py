"""A network that keeps 1 of every 8 weights: cut after training by Wanda's score and repaired, or trained with mask decay.

The dense weights stay what the optimizer trains; the forward pass sees them through a mask that is chosen anew at each step.
Data: scikit-learn's digits. About 5 s.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from dither import optim, sparsity

torch.set_num_threads(1)  # the network is tiny
images, labels = load_digits(return_X_y=True)
split = train_test_split(images / 16, labels, test_size=0.3, stratify=labels, random_state=0)
train_x, test_x, train_y, test_y = (torch.from_numpy(a).to(torch.float32 if a.ndim == 2 else torch.int64) for a in split)
STEPS = 600


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(model: nn.Module, recipe: sparsity.Recipe | None = None, steps: int = STEPS) -> None:
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(train_x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
        optimizer.step()
        if recipe:
            recipe.step()


def accuracy(model: nn.Module) -> float:
    return 100 * (model(test_x).argmax(1) == test_y).double().mean().item()


dense = network()
train(dense)
print(f"dense: {accuracy(dense):.1f} %")

cut = network()
cut.load_state_dict(dense.state_dict())
masks = sparsity.prune(cut, [train_x], "wanda", n=1, m=8)
print(f"1:8 by Wanda's score, not trained: {accuracy(cut):.1f} %")
sparsity.apply_masks(cut, masks)
train(cut, steps=200)
print(f"and 200 more steps under its mask: {accuracy(cut):.1f} %")

sparse = network()
recipe = sparsity.MaskDecay(sparse, (1, 8), end=STEPS // 2)
train(sparse, recipe)
recipe.finish()
print(f"1:8 by mask decay: {accuracy(sparse):.1f} %")
print(sparsity.density_report(sparse))
