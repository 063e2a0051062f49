"""Train and prune a network with Accelerate, with accumulated gradients.

    python examples/accelerate_loop.py        # or: accelerate launch examples/accelerate_loop.py"""
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fasterai.sparsifier import Sparsifier

EPOCHS, ACCUMULATED = 8, 2


def main():
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    loader = DataLoader(data, batch_size=32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    sparsifier = Sparsifier(model)  # the model that was prepared, so that all processes agree on each event
    steps = EPOCHS * -(-len(loader) // ACCUMULATED)  # those of the optimizer: Accelerate ends an epoch with a step
    attached = sparsifier.attach(optimizer, sparsity=90, schedule='gradual', steps=steps)
    for _ in range(EPOCHS):
        for xb, yb in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(xb), yb))
                if accelerator.sync_gradients:
                    sparsifier.mask_gradients()  # so that those of pruned weights do not count in the norm
                    accelerator.clip_grad_norm_(model.parameters(), 1.)
                optimizer.step()
                optimizer.zero_grad()

    accelerator.print(sparsifier.report())
    zeros = sum(int((layer.weight == 0).sum()) for layer in sparsifier.layers.values())
    assert zeros == round(.9 * (64 * 256 + 256 * 10)) and attached.is_over


if __name__ == '__main__': main()
