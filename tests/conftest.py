"Small networks and learners that the tests share."
from fractions import Fraction
from functools import partial

import matplotlib
import pytest
import torch
from fastai.callback import progress  # noqa: F401 a default callback of every Learner from then on
from fastai.data.core import DataLoaders
from fastai.learner import Learner, noop
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.context import CONTEXTS
from fasterai.selection import LayerGroups

matplotlib.use('Agg')
torch.set_num_threads(1)  # the tests run side by side, and small networks gain nothing


def convnet():
    "Two blocks and an output layer: Conv2d, BatchNorm, ReLU; 8 × 8 grey images to 10 classes."
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                         nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


class Made(nn.Module):
    "A network of named layers and a function of them."
    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items(): setattr(self, name, layer)

    def forward(self, *args): return self.run(self, *args)


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


# Of a model and its Sparsifier

def zeros(model):
    "How many zeros there are in each weight."
    weights = {n: p for n, p in model.named_parameters() if n.endswith('weight') and p.ndim > 1}
    return {n: int((p == 0).sum()) for n, p in weights.items()}


def tensors_of(sparsifier):
    "Copies of all parameters and masks."
    parameters = [p.detach().clone() for p in sparsifier.model.parameters()]
    return parameters + [sparsifier.masks[n].clone() for n in sparsifier.layers]


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Of groups without a model

INF = torch.inf


def layer(name, scores, size=1, cost=None, **more):
    "Groups with a score each; -inf is pruned already; one cost for all or one each."
    scores = torch.tensor(scores, dtype=torch.float32)
    costs = None if cost is None else torch.tensor(cost)
    return LayerGroups(name, len(scores) * size, size, scores > -INF, lambda where: scores[where].nan_to_num(neginf=0.), costs, **more)


def kept(context, layers, share):
    "What a context keeps, as lists of 0 and 1."
    return [keep.int().tolist() for keep in CONTEXTS[context](layers, Fraction(share))]
