"""Real digits: 1,797 scanned 8 x 8 images of the UCI repository, as scikit-learn ships them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import noise
from .._extras import require

datasets = require("sklearn.datasets", extra="demo")

SPLIT_SEED = 0


class Part(NamedTuple):
    images: Tensor  # (n, 64) float32, mean 0 and variance 1 over the training pixels
    labels: Tensor  # (n,) int64, 0 to 9


class Digits(NamedTuple):
    train: Part
    validation: Part
    test: Part


def digits(device: str = "cpu") -> Digits:
    """The images in a fixed random split with equal classes: 1,077 for training, 360 for validation, 360 for the test."""
    images, labels = (torch.from_numpy(array) for array in datasets.load_digits(return_X_y=True))
    order = (labels + noise.uniform(len(labels), seed=SPLIT_SEED, dtype=torch.float64)).argsort()  # class by class
    fifth = torch.arange(len(labels)) % 5
    parts = order[fifth > 1], order[fifth == 0], order[fifth == 1]
    train = images[parts[0]]
    images = ((images - train.mean()) / train.std()).float()
    return Digits(*(Part(images[part].to(device), labels[part].to(device)) for part in parts))
