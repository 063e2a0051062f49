"""Train and prune a network that torch.compile has compiled. It needs a C++ compiler.

    python examples/compiled.py"""
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fasterai.sparsifier import Sparsifier

EPOCHS = 8


def main():
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    model = torch.compile(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    sparsifier = Sparsifier(model)  # names are those of the model without its wrapper
    sparsifier.attach(optimizer, sparsity=90, schedule='gradual', steps=EPOCHS * len(loader))
    for _ in range(EPOCHS):
        for xb, yb in loader:
            F.cross_entropy(model(xb), yb).backward()
            optimizer.step()
            optimizer.zero_grad()

    print(sparsifier.report())
    zeros = sum(int((layer.weight == 0).sum()) for layer in sparsifier.layers.values())
    assert zeros == round(.9 * (64 * 256 + 256 * 10)) and set(sparsifier.layers) == {'0', '2'}


if __name__ == '__main__': main()
