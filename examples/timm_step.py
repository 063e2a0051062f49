"""Train and prune a small vision transformer with timm's optimizers, schedulers and averaged model.

    python examples/timm_step.py"""
import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fasterai.sparsifier import Sparsifier

EPOCHS = 6


def main():
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y))
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=2)
    steps = EPOCHS * len(loader)
    optimizer = create_optimizer_v2(model, 'lookahead_adamw', lr=3e-3, weight_decay=.05)  # one around another
    scheduler = CosineLRScheduler(optimizer, steps, warmup_t=20, warmup_lr_init=1e-4, t_in_epochs=False)
    average = ModelEmaV3(model, decay=.9)

    sparsifier = Sparsifier(model, exclude='head')
    attached = sparsifier.attach(optimizer, sparsity=80, schedule='gradual', steps=steps)
    for epoch in range(EPOCHS):
        for i, (xb, yb) in enumerate(loader):
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            sparsifier.mask_gradients()  # so that those of pruned weights do not count in the norm
            dispatch_clip_grad(model.parameters(), 1.)
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
            scheduler.step_update(epoch * len(loader) + i)
    averaged = Sparsifier(average.module, exclude='head')
    averaged.masks.update(sparsifier.masks)  # a mean over steps is not zero where a weight was pruned lately

    print(averaged.report())
    layers = [*sparsifier.layers.values(), *averaged.layers.values()]
    zeros, weights = sum(int((at.weight == 0).sum()) for at in layers), sum(at.weight.numel() for at in layers)
    assert zeros == 2 * round(.8 * weights / 2) and attached.is_over


if __name__ == '__main__': main()
