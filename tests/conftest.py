"Small networks and learners that the tests share."
from functools import partial

import matplotlib
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner, noop
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import TensorDataset

matplotlib.use('Agg')
torch.set_num_threads(1)  # the tests run side by side, and small networks gain nothing


def convnet():
    "Two blocks and an output layer: Conv2d, BatchNorm, ReLU; 8 × 8 grey images to 10 classes."
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                         nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.fixture(autouse=True)
def seed(): set_seed(0)


@pytest.fixture
def net(): return convnet()


def new_learner(path, model=None, batches=4, bs=8, **kwargs):
    "A silent learner on random images; `model` and what `Learner` takes can be given."
    set_seed(0)
    x, y = torch.randn(batches * bs, 1, 8, 8), torch.randint(0, 10, (batches * bs,))
    data = TensorDataset(x, y)
    dls = DataLoaders.from_dsets(data, data, bs=bs, num_workers=0, pin_memory=False, device='cpu')
    learn = Learner(dls, model or convnet(), loss_func=CrossEntropyLossFlat(), path=path, **{'metrics': accuracy} | kwargs)
    learn.remove_cb(learn.progress)
    learn.logger = noop
    return learn


@pytest.fixture
def make_learner(tmp_path): return partial(new_learner, tmp_path)
