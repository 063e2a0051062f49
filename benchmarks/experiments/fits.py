"Train with fastai on tensors that lie in memory."
from functools import partial
from math import ceil

import torch
from fastai.callback.schedule import SchedCos  # noqa: F401 (gives a Learner fit_one_cycle)
from fastai.data.core import DataLoaders
from fastai.learner import Learner, noop
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from torch import nn

DECAY = 5e-4


class Slices:
    "Give batches of tensors; in another order in each epoch where they are shuffled."

    def __init__(self, x, y, size, shuffle=False, change=None):
        self.x, self.y, self.size, self.shuffle, self.change = x, y, size, shuffle, change
        self.dataset = range(len(x))

    def __len__(self): return ceil(len(self.x) / self.size)

    def __iter__(self):
        order = torch.randperm(len(self.x)) if self.shuffle else torch.arange(len(self.x))
        for at in order.split(self.size):
            x = self.x[at]
            yield x if self.change is None else self.change(x), self.y[at]


def learner(net, train, test, size, seed, change=None) -> Learner:
    "Return a silent Learner with SGD."
    torch.manual_seed(1000 + seed)
    dls = DataLoaders(Slices(*train, size, True, change), Slices(*test, 1000), device='cpu')
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss(), opt_func=partial(SGD, mom=.9), wd=DECAY, metrics=accuracy)
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    learn.logger = noop
    return learn
