"""LeNet-300-100 on MNIST: SNIP (Lee et al. 2019) prunes it at initialization and then trains it; Han et al.
(2015) train it, prune it by magnitude and train it on. A dense network is trained on for as many epochs, for comparison."""
from copy import deepcopy

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from experiments.rows import Goal, averaged, timed
from fasterai.sparsifier import Sparsifier

SEEDS = 2  # of SNIP
EPOCHS = 20
BATCH = 100
SNIP = {95: 1.6, 98: 2.4}  # sparsity: published error
HAN = 70, 85, 92  # the sparsities after which it is trained on
HAN_SEEDS = 3


def run(data):
    "Yield the errors on the 10,000 test digits."
    packed = np.load(data / 'mnist/mnist.npz')
    train, test = (_digits(packed, part) for part in ('train', 'test'))
    for sparsity, published in SNIP.items():
        found = []
        for seed in range(SEEDS):
            net = network(seed)
            batch = [tensor[seed * BATCH:][:BATCH] for tensor in train]
            with timed() as clock: sparsifier = _snip(net, sparsity, tuple(batch))
            fit(net, train, seed, EPOCHS, .1, sparsifier)
            found.append(error(net, test))
        row = averaged('LeNet-300-100', f'SNIP {sparsity} %, error %', found, str(published), True, clock.seconds, 2)
        yield row
        yield Goal(f'SNIP at {sparsity} %: the error of the paper ({published} %)', row.ours,
                   float(row.ours) <= published)
    yield from _han_rows([_han(seed, train, test) for seed in range(HAN_SEEDS)])


def _han(seed, train, test):
    "Return the errors of a dense network, of that trained on, and of that pruned and trained on alike."
    first = network(seed)
    fit(first, train, seed, EPOCHS, .1)
    longer, pruned = deepcopy(first), deepcopy(first)
    sparsifier = Sparsifier(pruned)
    for sparsity in HAN:
        sparsifier.sparsify_model(sparsity)
        fit(pruned, train, seed, EPOCHS // 2, .1, sparsifier)
        fit(longer, train, seed, EPOCHS // 2, .1)
    return [error(net, test) for net in (first, longer, pruned)]


def _han_rows(found):
    "Yield rows and the goal, from what `_han` has found with each seed."
    first, longer, pruned = zip(*found)
    total = EPOCHS + len(HAN) * EPOCHS // 2
    yield averaged('LeNet-300-100', f'dense, {EPOCHS} epochs, error %', first, '1.64', True, digits=2)
    yield averaged('LeNet-300-100', f'dense, {total} epochs, error %', longer, '1.64', True, digits=2)
    yield averaged('LeNet-300-100', f'Han, 8 % of the weights left, {total} epochs, error %', pruned, '1.59', True, digits=2)
    lost = averaged('', '', [after - before for before, after in zip(longer, pruned)], digits=2)
    yield Goal(f'Han: 8 % of the weights kept without loss, {total} epochs each',
               f'{float(lost.ours):+.2f} points of error, standard error {lost.error}', float(lost.ours) <= 0)


def _digits(packed, part):
    x = torch.tensor(packed[f'x_{part}']).flatten(1).float() / 255
    return (x - .1307) / .3081, torch.tensor(packed[f'y_{part}']).long()


def network(seed) -> nn.Sequential:
    "Return the network, with initial weights by Glorot & Bengio."
    torch.manual_seed(seed)
    sizes = 784, 300, 100, 10
    linears = [nn.Linear(before, after) for before, after in zip(sizes, sizes[1:])]
    for layer in linears:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])


def _snip(net, sparsity, batch):
    sparsifier = Sparsifier(net, criteria='gradient', data=[batch], loss_func=F.cross_entropy)
    sparsifier.sparsify_model(sparsity)
    return sparsifier


def fit(net, train, seed, epochs, rate, sparsifier=None):
    "Train a network, with a learning rate that rises and falls to 0."
    x, y = train
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * (len(x) // BATCH), pct_start=.1, cycle_momentum=False)
    if sparsifier is not None: sparsifier.attach(optimizer)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for at in torch.randperm(len(x), generator=generator).view(-1, BATCH):
            F.cross_entropy(net(x[at]), y[at]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    if sparsifier is not None: sparsifier.detach()


@torch.no_grad()
def error(net, test) -> float:
    "Return the percentage of digits that are classified as others."
    x, y = test
    return 100 * float((net(x).argmax(1) != y).float().mean())
