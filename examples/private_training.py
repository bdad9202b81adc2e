"""Training within a budget of privacy: a small model without it, at epsilon 4, and at epsilon 1.

Gradients are clipped sample by sample in one backward pass; batches are drawn by Poisson sampling, as the accounting assumes,
and come in pieces that fit in memory. Data: scikit-learn's digits and a convolutional network, or with `--data breast_cancer`
569 records and logistic regression. Needs `pip install 'dither[privacy]'`. About 10 s.
"""

import argparse

import torch
from sklearn import datasets
from torch import nn
from torch.utils.data import TensorDataset

import dither
from dither import privacy

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", choices=("digits", "breast_cancer"), default="digits")
which = parser.parse_args().data
torch.set_num_threads(1)  # the models are tiny
x, y = (torch.from_numpy(array) for array in getattr(datasets, f"load_{which}")(return_X_y=True))
if which == "digits":
    x, lr, delta = (x / 8 - 1).float().view(-1, 1, 8, 8), 1e-2, 1e-4
    make = lambda: nn.Sequential(nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
else:
    x, lr, delta = (x + 0.01).log().float(), 3e-2, 1e-3  # not by means and deviations: those are of the data
    make = lambda: nn.Linear(30, 2)
test = dither.noise.bernoulli(len(y), p=0.2, dtype=torch.bool, seed=0)
data = TensorDataset(x[~test], y[~test])
RATE, STEPS = 0.2, 100

for epsilon in (None, 4.0, 1.0):
    torch.manual_seed(0)
    model = make()
    optimizer = dither.optim.AdamW(model.parameters(), lr=lr)
    loader = privacy.poisson_loader(data, RATE, steps=STEPS)
    if epsilon:
        privacy.make_private_with_epsilon(
            model,
            optimizer,
            target_epsilon=epsilon,
            target_delta=delta,
            loader=loader,
            steps=STEPS,
            max_grad_norm=1.0,
            loss_reduction="sum",
        )
    for (inputs, labels), is_last in privacy.split(loader, 128):
        # Clips, and adds to what the batch has so far.
        nn.functional.cross_entropy(model(inputs), labels, reduction="sum").backward()
        if is_last:
            optimizer.step()  # adds the noise, once a batch
            optimizer.zero_grad()
    accuracy = 100 * (model(x[test]).argmax(1) == y[test]).double().mean()
    spent = f"epsilon {privacy.get_epsilon(optimizer, delta):.2f} at delta {delta:g}" if epsilon else "without privacy"
    print(f"{spent}: test accuracy {accuracy:.1f} %")
print(optimizer.privacy.ledger)
