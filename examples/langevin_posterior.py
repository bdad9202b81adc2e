"""Bayesian logistic regression by Langevin dynamics, next to the MAP estimate and Laplace's approximation.

`dither.optim.SGLD` (Welling & Teh 2011) turns a training loop into a sampler: steps along the gradient of a minibatch, plus
noise drawn inside the step. Chains are columns of one parameter, and each column draws its own noise.
`dither.sampling.langevin` takes the density itself: underdamped dynamics on all of the data, whose steps carry further. Data:
scikit-learn's breast cancer, 30 standardised features and a constant, prior N(0, 1) on every weight. About 8 s.
"""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import dither

CHAINS, STEPS, BURN_IN, BATCH = 32, 8000, 1000, 128

torch.set_num_threads(1)
features, labels = (torch.from_numpy(array) for array in load_breast_cancer(return_X_y=True))
test = dither.noise.bernoulli(len(labels), p=0.25, dtype=torch.bool, seed=0)
features = (features - features[~test].mean(0)) / features[~test].std(0)
x = torch.cat([features, torch.ones(len(labels), 1)], 1).float()
x, y, x_test, y_test = x[~test], labels[~test].float(), x[test], labels[test].float()

weights = torch.nn.Parameter(torch.zeros(x.shape[1], CHAINS))
optimizer = dither.optim.SGLD([weights], lr=1e-3, data_size=len(x), weight_decay=1.0, seed=0)
found = []
for step in range(STEPS):
    batch = dither.noise.randint(0, len(x), BATCH, seed=0, stream=1, step=step)
    loss = cross_entropy(x[batch] @ weights, y[batch, None].expand(-1, CHAINS)) * CHAINS  # each chain's mean over the batch
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step >= BURN_IN and step % 10 == 0:
        found.append(weights.detach().T.clone())


def log_posterior(w: torch.Tensor) -> torch.Tensor:
    return -cross_entropy(w @ x.T, y.expand(len(w), -1), reduction="none").sum(1) - w.square().sum(1) / 2


chains = dither.sampling.langevin(
    torch.zeros(CHAINS, x.shape[1]), logp=log_posterior, step=0.1, friction=0.5, steps=2500, burn_in=500, seed=0
)

most_likely = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-8, max_iter=1000).fit(x, y)
mode = torch.from_numpy(most_likely.coef_[0]).float()
p = torch.sigmoid(x @ mode)
laplace_std = torch.linalg.inv(x.T @ ((p * (1 - p))[:, None] * x) + torch.eye(len(mode))).diagonal().sqrt()


def scores(predicted: torch.Tensor) -> str:
    right = ((predicted > 0.5) == (y_test > 0.5)).double().mean()
    log_loss = torch.nn.functional.binary_cross_entropy(predicted, y_test)
    return f"test accuracy {100 * right:.1f} %, log loss {log_loss:.4f}"


print("MAP  ", scores(torch.sigmoid(x_test @ mode)))
for name, samples in (("SGLD ", torch.stack(found)), ("BAOAB", chains.samples)):  # [kept, chains, weights]
    print(name, scores(sum(torch.sigmoid(s @ x_test.T).mean(0) for s in samples) / len(samples)))
    mean, std = samples.mean((0, 1)), samples.std((0, 1))
    size, agreement = dither.sampling.effective_sample_size(samples), dither.sampling.r_hat(samples)
    print(f"  |mean - mode| / Laplace's std: mean {((mean - mode) / laplace_std).abs().mean():.2f}")
    print(f"  std / Laplace's std: {(std / laplace_std).min():.2f} to {(std / laplace_std).max():.2f}")
    worth = f"{size.min():.0f} to {size.max():.0f} independent samples of {CHAINS * len(samples)}"
    print(f"  worth {worth}, R-hat {agreement.max():.3f}")
