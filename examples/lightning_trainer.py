"""Train and prune a network with Lightning: automatic optimization, then manual.

    python examples/lightning_trainer.py"""
import logging
import warnings

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fasterai.sparsifier import Sparsifier

EPOCHS = 8


class Digits(lightning.LightningModule):
    def __init__(self, automatic):
        super().__init__()
        self.automatic_optimization = automatic
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        self.sparsifier = Sparsifier(self.net)
        steps = int(self.trainer.estimated_stepping_batches)
        self.attached = self.sparsifier.attach(optimizer, sparsity=90, schedule='gradual', steps=steps)
        return optimizer

    def training_step(self, batch, index):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        if self.automatic_optimization: return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def on_save_checkpoint(self, checkpoint): checkpoint['sparsifier'] = self.sparsifier.state_dict()

    def on_load_checkpoint(self, checkpoint): self.loaded = checkpoint['sparsifier']  # there is no Sparsifier yet

    def on_train_start(self):
        if hasattr(self, 'loaded'): self.sparsifier.load_state_dict(self.loaded)


def main():
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    warnings.filterwarnings('ignore', module='lightning')
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
    for automatic in (True, False):
        lightning.seed_everything(0, verbose=False)
        loader = DataLoader(data, batch_size=64, shuffle=True)
        module = Digits(automatic)
        trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator='cpu', logger=False, enable_checkpointing=False,
                                    enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, loader)
        print(f'{"automatic" if automatic else "manual"} optimization')
        print(module.sparsifier.report())
        zeros = sum(int((layer.weight == 0).sum()) for layer in module.sparsifier.layers.values())
        assert zeros == round(.9 * (64 * 256 + 256 * 10)) and module.attached.is_over


if __name__ == '__main__': main()
