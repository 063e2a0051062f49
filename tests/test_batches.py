"Training batches are read beside a fit, and the fit is the same as without."
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import convnet, new_learner
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, Datasets
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fasterai.batches import TrainingBatches, spread
from fasterai.data import read_data


def learner_of(train, model=None):
    "What `TrainingBatches` reads of a Learner."
    dls = DataLoaders(train, train)
    return SimpleNamespace(dls=dls, model=model or nn.Linear(1, 1), _set_device=lambda batch: batch)


def values(batches): return torch.cat([inputs[0].flatten() for inputs, *_ in batches]).tolist()


numbers = torch.arange(100.)[:, None]


@pytest.mark.parametrize('n, items, expected', [(6, 10, [0, 1, 2, 3, 4, 5]), (10, 4, [0, 2, 5, 7]), (1000, 3, [0, 333, 666]), (0, 5, [])])
def test_positions_are_spread(n, items, expected): assert spread(n, items) == expected


def test_items_are_spread_over_the_training_data_in_its_order():
    data = TensorDataset(numbers, numbers)
    fastai = DataLoaders.from_dsets(data, data, bs=4, num_workers=0, device='cpu', pin_memory=False, drop_last=True).train
    own = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(data), 4, False)
    assert values(TrainingBatches(learner_of(fastai), 10)) == list(range(0, 100, 10))
    assert values(TrainingBatches(learner_of(DataLoader(data, 4, shuffle=True)), 10)) == list(range(0, 100, 10))
    assert values(TrainingBatches(learner_of(DataLoader(data, batch_sampler=own)), 10)) == list(range(12))
    assert len(values(TrainingBatches(learner_of(fastai)))) == 100
    batches = [(numbers[i:i + 4], numbers[i:i + 4]) for i in range(0, 100, 4)]
    assert values(TrainingBatches(learner_of(DataLoader(batches, batch_size=None)), 10)) == list(range(12))


def test_data_that_only_come_one_after_the_other():
    class Stream(IterableDataset):
        def __iter__(self): return iter([(x, x) for x in numbers])
        def __len__(self): return 100
    assert values(TrainingBatches(learner_of(DataLoader(Stream(), 4)), 10)) == list(range(12))


def test_inputs_are_those_that_the_learner_takes():
    x, y = torch.randn(8, 3), torch.zeros(8)

    def first(batch, n_inp=None):
        learn = learner_of(DataLoader([batch], batch_size=None, collate_fn=lambda b: b))
        if n_inp: learn.dls.n_inp = n_inp
        return next(iter(TrainingBatches(learn)))
    assert first((x, y)) == ((x,), y) and first([x, x, y]) == ((x, x), y) and first((x,)) == ((x,),)
    assert first((x, y, y), n_inp=1) == ((x,), (y, y)) and first((x, x, y, y), n_inp=2) == ((x, x), (y, y))
    assert first(({'x': x}, y)) == (({'x': x},), y)
    parts = Datasets(list(range(8)), [[lambda i: x[i]], [lambda i: x[i] + 1], [lambda i: y[i]], [lambda i: y[i]]], n_inp=2)
    inputs, targets = next(iter(TrainingBatches(learner_of(parts.dataloaders(bs=4, device='cpu', num_workers=0).train))))
    assert (inputs[1] == inputs[0] + 1).all() and len(targets) == 2
    read, = read_data([(inputs, targets)], nn.Bilinear(3, 3, 1))
    assert len(read.args) == 2 and read.args[0] is inputs[0]


def test_several_inputs_without_a_target(tmp_path):
    learn = new_learner(tmp_path)
    learn.dls.n_inp = 2
    (inputs,), *_ = TrainingBatches(learn)
    assert len(inputs) == 2


class Reads(Callback):
    "Reads training batches in the middle of each step."
    order = 50

    def before_fit(self): self.batches = TrainingBatches(self.learn, 16)
    def before_step(self): self.n = len(list(self.batches))


def jitter(x): return x + random.random() + np.random.rand() + torch.rand(1)


@pytest.mark.parametrize('of_torch', [False, True])
def test_a_fit_is_the_same_where_batches_are_read_beside_it(tmp_path, of_torch):
    found = []
    for cbs in ([], [Reads()]):
        torch.manual_seed(0)
        learn = new_learner(tmp_path, nn.Sequential(nn.Dropout(.3), convnet()))
        data = [(x, y) for x, y in learn.dls.train.dataset]
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        if of_torch: learn.dls.loaders[0] = DataLoader(data, 8, shuffle=True)
        else: learn.dls = Datasets(range(32), [[lambda i: jitter(data[i][0])], [lambda i: data[i][1]]]).dataloaders(bs=8, device='cpu', num_workers=0)
        learn.loss_func = CrossEntropyLossFlat()
        learn.fit(2, cbs=cbs)
        found.append([*learn.model.state_dict().values(), torch.rand(1), torch.tensor([random.random(), np.random.rand()])])
    assert cbs[0].n == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_nothing_is_read_before_it_is_iterated_and_callbacks_see_nothing(tmp_path):
    learn, seen = new_learner(tmp_path), []

    class Note(Callback):
        def before_batch(self): seen.append(self.xb)
    learn.add_cb(Note())
    batches = TrainingBatches(learn, 8)
    learn.dls.train.dataset.tensors = (torch.ones(32, 1, 8, 8), learn.dls.train.dataset.tensors[1])
    assert values(batches) == [1.] * 512 and values(batches) == [1.] * 512 and not seen and not hasattr(learn, 'xb')
