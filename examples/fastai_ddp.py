"""Train and prune a network on several processes with fastai. It needs accelerate.

    torchrun --nproc-per-node 2 examples/fastai_ddp.py"""
import os

import torch
from fastai.basics import Learner, accuracy
from fastai.callback import progress, schedule  # noqa: F401 they show the epochs, and add fit_one_cycle to Learner
from fastai.data.core import DataLoaders
from fastai.distributed import DistributedDL, setup_distrib
from fastai.losses import CrossEntropyLossFlat
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.utils.data import TensorDataset

from fasterai.callback import SparsifyCallback

on_cpu = not torch.cuda.is_available()
if not on_cpu: setup_distrib(int(os.environ['LOCAL_RANK']))


def broadcast(loader, indices, rank):
    indices = torch.LongTensor(indices)
    distributed.broadcast(indices, rank)
    return indices.tolist()


if on_cpu: DistributedDL._broadcast = broadcast  # fastai's own sends the indices through a GPU

x, y = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y))
device = 'cpu' if on_cpu else torch.device('cuda', int(os.environ['LOCAL_RANK']))
dls = DataLoaders.from_dsets(data, data, bs=32, num_workers=0, device=device)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))  # the same on all: DDP sends that of the first
learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=SparsifyCallback(90))
with learn.distrib_ctx(sync_bn=False, cpu=on_cpu): learn.fit_one_cycle(4, 3e-3)
distributed.destroy_process_group()
