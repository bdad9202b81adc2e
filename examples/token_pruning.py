"""A vision transformer that computes fewer tokens: trained with all, then pruned by importance or by chance, or merged.

Nothing is trained again. Data: scikit-learn's digits, 16 patches of 2 x 2 pixels and a class token. About 20 s.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from dither import optim, tokens

torch.set_num_threads(1)  # the model is tiny
torch.manual_seed(0)
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
patches = F.pixel_unshuffle((images / 8 - 1).float().view(-1, 1, 8, 8), 2).flatten(2).mT
test = torch.arange(len(labels)) % 5 == 0


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(4, 64), nn.Parameter(torch.randn(1, 17, 64) / 4)
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(self.embed(x), (0, 0, 1, 0)) + self.places  # the class token is its place
        return self.head(self.encoder(x)[:, 0])


model, train = Classifier(), (~test).nonzero()[:, 0]
optimizer = optim.AdamW(model.parameters(), lr=2e-3, max_norm=1.0)
for _ in range(500):
    batch = train[torch.randint(len(train), (64,))]
    optimizer.zero_grad()
    F.cross_entropy(model(patches[batch]), labels[batch]).backward()
    optimizer.step()
model.eval()
accuracy = lambda: 100 * (model(patches[test]).argmax(1) == labels[test]).double().mean().item()
print(f"16 patches: {accuracy():.1f} %")
for score in ("cls", "pagerank", "random"):
    with tokens.patched(model, "prune", keep={0: 0.5, 1: 0.5}, score=score, prefix=1):
        print(f"8 after the first layer, 4 after the second, by {score}: {accuracy():.1f} %")
with tokens.patched(model, "tome", r=(8, 4), prefix=1) as handle:
    print(f"8 and 4 by merging: {accuracy():.1f} %, tokens {[record.after for record in handle.records]}")
