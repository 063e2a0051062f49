"""Train and prune a network of which each process has a part, in a loop of one's own.

    torchrun --nproc-per-node 2 examples/fsdp.py"""
import os

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from fasterai.schedule import gradual
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

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
for layer in model: fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

sparsifier = Sparsifier(model)  # after fully_shard, on every process
sparsifier.attach(optimizer)
schedule, step, n_steps = gradual(), 0, EPOCHS * len(loader)
for epoch in range(EPOCHS):
    loader.sampler.set_epoch(epoch)
    for xb, yb in loader:
        F.cross_entropy(model(xb.to(device)), yb.to(device)).backward()
        step += 1
        sparsifier.sparsify_model(90, schedule(step / n_steps))  # on every process, as backward is
        optimizer.step()
        optimizer.zero_grad()

report = sparsifier.report()  # on every process
if distributed.get_rank() == 0: print(report)
if 'SAVE' in os.environ:  # each process writes its part
    checkpoint.save({'model': model.state_dict(), 'masks': sparsifier.state_dict()}, checkpoint_id=os.environ['SAVE'])
distributed.destroy_process_group()
