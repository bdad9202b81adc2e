"""All-bfloat16 training that does not stall: AdamW at a small learning rate, rounded to nearest and stochastically.

bfloat16 keeps 8 bits: near a weight of 0.1 the next number is 0.0005 away. AdamW moves a weight by about lr a step, so that
with lr 3e-5 rounding to nearest returns most weights to where they were. Stochastic rounding takes the whole step with the
right probability: right on average, without a float32 copy. Data: scikit-learn's digits. About 7 s.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import dither

torch.set_num_threads(1)  # the network is tiny
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images = ((images - images.mean()) / images.std()).float()
test = dither.noise.bernoulli(len(labels), p=0.2, dtype=torch.bool, seed=0)


def accuracy(dtype: torch.dtype, stochastic_rounding: bool, seed: int, steps: int = 1500) -> float:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).to(dtype)
    optimizer = dither.optim.AdamW(
        model.parameters(), lr=3e-5, state_dtype=dtype, stochastic_rounding=stochastic_rounding, seed=seed
    )
    x, y = images[~test].to(dtype), labels[~test]
    for step in range(steps):
        batch = dither.noise.randint(0, len(y), 64, seed=seed, stream=1, step=step)
        loss = nn.functional.cross_entropy(model(x[batch]).float(), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (model(images[test].to(dtype)).argmax(1) == labels[test]).double().mean().item()


for name, dtype, stochastic in (
    ("float32", torch.float32, False),
    ("bfloat16, to nearest", torch.bfloat16, False),
    ("bfloat16, stochastic", torch.bfloat16, True),
):
    accuracies = [accuracy(dtype, stochastic, seed) for seed in range(2)]
    print(f"{name:21} test accuracy {100 * sum(accuracies) / 2:.1f} %   seeds:", *(f"{100 * a:.1f}" for a in accuracies))
