"""Train and prune a network in a loop of one's own; stop in the middle and go on from a file.

    python examples/plain_loop.py"""
import os
import tempfile

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
    loader = DataLoader(data, batch_size=64, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, 'checkpoint.pt')
        train(loader, file, epochs=range(4))
        sparsifier = train(loader, file, epochs=range(4, EPOCHS))  # as in a new process
    print(sparsifier.report())
    zeros = sum(int((layer.weight == 0).sum()) for layer in sparsifier.layers.values())
    assert zeros == round(.9 * (64 * 256 + 256 * 10))


def train(loader, file, epochs):
    "Train some epochs, from the file on where there is one, and write it."
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier = Sparsifier(model)
    if os.path.exists(file):
        saved = torch.load(file)
        model.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        sparsifier.load_state_dict(saved['sparsifier'])  # the masks, and how many steps are done

    sparsifier.attach(optimizer, sparsity=90, schedule='gradual', steps=EPOCHS * len(loader))
    for epoch in epochs:
        for xb, yb in loader:
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f'epoch {epoch}: loss {loss:.3f}, {sparsifier.sparsity:.2f} % zeros')

    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
                'sparsifier': sparsifier.state_dict()}, file)
    return sparsifier


if __name__ == '__main__': main()
