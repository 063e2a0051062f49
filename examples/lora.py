"""Fine-tune a sparse, frozen network by LoRA (PEFT), so that no zero is revived when LoRA is merged.

The update of a weight, B A, is dense: merged as it is, it would fill all zeros. Here it is masked, in training too,
so that the merged network computes what was trained.

    python examples/lora.py"""
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fasterai.sparsifier import Sparsifier


class MaskedLinear(Linear):
    "LoRA of a sparse layer: where the weight is zero there is no update."
    def get_delta_weight(self, adapter):  # merging asks for this
        return super().get_delta_weight(adapter) * (self.get_base_layer().weight != 0)

    def forward(self, x, *args, **kwargs):
        if self.merged or self.disable_adapters: return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        updates = [self.get_delta_weight(adapter) for adapter in self.active_adapters]
        return F.linear(x, base.weight + sum(updates), base.bias)


def main():
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    base = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    optimizer, loader = torch.optim.AdamW(base.parameters(), lr=3e-3), batches(x, y)  # the digits as they are
    sparsifier = Sparsifier(base)
    with sparsifier.attach(optimizer, sparsity=90, schedule='gradual', steps=8 * len(loader)):
        for _ in range(8): epoch(base, optimizer, loader)

    config = LoraConfig(r=4, lora_alpha=8, target_modules=['0', '2'])
    config._register_custom_module({nn.Linear: MaskedLinear})
    model = get_peft_model(base, config)
    loader = batches(x.flip(1), y)  # another task: the digits upside down
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    before = accuracy(model, loader)
    for _ in range(8): epoch(model, optimizer, loader)
    after, outputs = accuracy(model, loader), model(x)

    merged = model.merge_and_unload()
    print(sparsifier.report())  # its layers are found again by their names
    print(f'upside down {100 * before:.1f} % right before LoRA, {100 * after:.1f} % after it')
    masks = dict(sparsifier.masks)
    zeros = {name: merged.get_submodule(name).weight == 0 for name in masks}
    assert all(torch.equal(zeros[name], ~masks[name]) for name in masks)
    assert sum(int(zero.sum()) for zero in zeros.values()) == round(.9 * (64 * 256 + 256 * 10))
    assert torch.allclose(merged(x), outputs, atol=1e-4) and after > before


def batches(x, y): return DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)


def epoch(model, optimizer, loader):
    for xb, yb in loader:
        F.cross_entropy(model(xb), yb).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model, loader):
    x, y = loader.dataset.tensors
    return float((model(x).argmax(1) == y).float().mean())


if __name__ == '__main__': main()
