"""Training within a budget of privacy: a small convolutional network without it, at epsilon 4, and at epsilon 1.

Gradients are clipped sample by sample in one backward pass; batches are drawn by Poisson sampling, as the accounting assumes,
and come in pieces that fit in memory. Data: scikit-learn's digits. Needs `pip install 'dither[privacy]'`. About 10 s.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import dither
from dither import privacy

torch.set_num_threads(1)  # the network is tiny
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images = (images / 8 - 1).float().view(-1, 1, 8, 8)
test = dither.noise.bernoulli(len(labels), p=0.2, dtype=torch.bool, seed=0)
data = TensorDataset(images[~test], labels[~test])
RATE, STEPS, DELTA = 0.2, 100, 1e-4

for epsilon in (None, 4.0, 1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    optimizer = dither.optim.AdamW(model.parameters(), lr=1e-2)
    loader = privacy.poisson_loader(data, RATE, steps=STEPS)
    if epsilon:
        privacy.make_private_with_epsilon(
            model,
            optimizer,
            target_epsilon=epsilon,
            target_delta=DELTA,
            loader=loader,
            steps=STEPS,
            max_grad_norm=1.0,
            loss_reduction="sum",
        )
    for (x, y), is_last in privacy.split(loader, 128):
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()  # clips, and adds to what the batch has so far
        if is_last:
            optimizer.step()  # adds the noise, once a batch
            optimizer.zero_grad()
    accuracy = 100 * (model(images[test]).argmax(1) == labels[test]).double().mean()
    spent = f"epsilon {privacy.get_epsilon(optimizer, DELTA):.2f} at delta {DELTA:g}" if epsilon else "without privacy"
    print(f"{spent}: test accuracy {accuracy:.1f} %")
print(optimizer.privacy.ledger)
