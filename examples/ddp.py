"""Train and prune a network on several processes, in a loop of one's own.

    torchrun --nproc-per-node 2 examples/ddp.py"""
import os

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fasterai.sparsifier import Sparsifier

EPOCHS = 4
on_gpus = torch.cuda.is_available()
device = torch.device('cuda', int(os.environ['LOCAL_RANK'])) if on_gpus else torch.device('cpu')
if on_gpus: torch.cuda.set_device(device)
distributed.init_process_group('nccl' if on_gpus else 'gloo')
torch.set_num_threads(1)

x, y = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
loader = DataLoader(data, batch_size=32, sampler=DistributedSampler(data))  # each process reads a part

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

sparsifier = Sparsifier(model)  # the model in its wrapper, so that all processes agree on each event
sparsifier.attach(optimizer, sparsity=90, steps=EPOCHS * len(loader))
for epoch in range(EPOCHS):
    loader.sampler.set_epoch(epoch)
    for xb, yb in loader:
        F.cross_entropy(model(xb.to(device)), yb.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()

state, report = sparsifier.state_dict(), sparsifier.report()
if distributed.get_rank() == 0:
    torch.save({'model': model.module.state_dict(), 'masks': state}, os.environ.get('SAVE', os.devnull))
    print(report)
distributed.destroy_process_group()
