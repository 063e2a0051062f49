"""LeNet-300-100 on MNIST, pruned while it trains, in the same number of steps each: gradual pruning, the recipe, and, with one
seed, RigL (Evci et al. 2020), SET (Mocanu et al. 2018) and AC/DC (Peste et al. 2021).

Learning rates, from the dense network one for each way, and what the recipe has, were chosen on the last 10,000 training
digits. Published is the error of sparse momentum (Dettmers & Zettlemoyer 2019), which trains longer."""
from copy import deepcopy
from itertools import product
from statistics import mean

import numpy as np
import torch
from torch.nn import functional as F

from experiments.lenet import _digits, error, network
from experiments.rows import Goal, averaged
from fasterai.schedule import gradual, steps
from fasterai.sparsifier import Sparsifier

SEEDS, EPOCHS, LATER, BATCH = 2, 5, 3, 100
RATE, DECAY = .2, 5e-4
RATES_LATER = {'gradual': .3, 'recipe': .2}
LENGTHS = 5,  # epochs, of the others with one seed
PUBLISHED = {95: '1.47', 98: '1.80'}
WAYS = {'gradual': {}, 'recipe': {'recipe': 'accurate'}}
EACH_10 = 'gradual each 10 steps'
OTHERS = {  # what `attach` is given, and what the Sparsifier
    EACH_10: ({'schedule': gradual(every=steps(10))}, {}),
    'RigL': ({'schedule': 'rigl'}, {'context': 'erk', 'regrow': 'gradient'}),
    'SET': ({'schedule': 'rigl'}, {'context': 'erk', 'regrow': 'random'}),
    'AC/DC': ({'schedule': 'acdc'}, {}),
}


def run(data):
    "Yield the errors on the 10,000 test digits."
    packed = np.load(data / 'mnist/mnist.npz')
    train, test = (_digits(packed, part) for part in ('train', 'test'))
    dense = [_trained(network(seed), train, seed) for seed in range(SEEDS)]
    found = {'dense': [error(net, test) for net in dense]}

    def errors(nets, *how):
        return [error(_trained(net, train, seed, *how), test) for seed, net in enumerate(nets)]

    def row(setting, values, sparsity=98):
        return averaged('LeNet-300-100', f'{setting}, error %', values, PUBLISHED[sparsity], True, digits=2)

    yield averaged('LeNet-300-100', f'dense, {EPOCHS} epochs, error %', found['dense'], '', True, digits=2)
    for sparsity, (name, when) in product(PUBLISHED, WAYS.items()):
        found[name, sparsity] = errors(map(network, range(SEEDS)), EPOCHS, RATE, sparsity, when)
        yield row(f'{sparsity} %, {name}, {EPOCHS} epochs', found[name, sparsity], sparsity)
    for name, when in WAYS.items():
        found[name, 'trained'] = errors(map(deepcopy, dense), LATER, RATES_LATER[name], 98, when)
        yield row(f'98 %, {name}, {LATER} epochs from the dense network', found[name, 'trained'])
    for cell, where in ((95, 'at 95 %'), (98, 'at 98 %'), ('trained', 'at 98 %, from the dense network')):
        yield from goals('LeNet-300-100 ' + where, found['dense'], found['gradual', cell], found['recipe', cell])
    for epochs, (name, how) in product(LENGTHS, OTHERS.items()):
        found[name, epochs] = errors([network(0)], epochs, RATE, 98, *how)
        yield row(f'98 %, {name}, {epochs} epochs', found[name, epochs])
    reached = mean(found['gradual', 98])
    yield Goal(f'LeNet-300-100 at 98 %, gradual, {EPOCHS} epochs: an error of at most 2.0 %', f'{reached:.2f}', reached <= 2.)


def goals(where, dense, gradual, recipe):
    "Yield whether a recipe is ahead of gradual pruning, and makes up for half of its loss against dense; all are errors."
    dense, gradual, recipe = map(mean, (dense, gradual, recipe))
    lost = gradual - dense
    yield Goal(f'{where}: the recipe is ahead of gradual pruning', f'{recipe:.2f} against {gradual:.2f}', recipe < gradual)
    made_up = f'{100 * (gradual - recipe) / lost:.0f} % of {lost:.2f} points' if lost > 0 else 'nothing is lost'
    yield Goal(f'{where}: half of the loss against dense is made up for', made_up, lost <= 0 or 2 * (gradual - recipe) >= lost)


def _trained(net, train, seed, epochs=EPOCHS, rate=RATE, sparsity=None, when=None, rules=None):
    "Train a network in one cycle of the learning rate and the momentum, and prune it if a sparsity is given."
    x, y = train
    torch.manual_seed(1000 + seed)
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=.95, weight_decay=DECAY)
    n_steps = epochs * len(x) // BATCH
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, n_steps, pct_start=.25)
    sparsifier = Sparsifier(net, **rules or {})
    attached = sparsifier.attach(optimizer, sparsity, steps=sparsity and n_steps, **when or {})
    for _ in range(epochs):
        for at in torch.randperm(len(x)).view(-1, BATCH):
            attached.loss(F.cross_entropy, net(x[at]), y[at], inputs=x[at]).backward()
            optimizer.step()
            optimizer.zero_grad()
            cycle.step()
    sparsifier.detach()
    return net
