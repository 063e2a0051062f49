"""LeNet-300-100 on MNIST, pruned while it trains, in the same number of steps each: gradual pruning, the recipe,
RigL (Evci et al. 2020), SET (Mocanu et al. 2018) and AC/DC (Peste et al. 2021).

Learning rates, and what the recipe has, were chosen on the last 10,000 training digits. Published is the error of sparse
momentum (Dettmers & Zettlemoyer 2019), which trains longer."""
from copy import deepcopy
from itertools import product
from statistics import mean

import numpy as np

from experiments.fits import learner
from experiments.lenet import _digits, error, network
from experiments.rows import Goal, averaged
from fasterai.callback import SparsifyCallback

SEEDS, EPOCHS, LATER, BATCH = 3, 5, 3, 100
RATE, RATE_LATER = .2, .1
PUBLISHED = {95: '1.47', 98: '1.80'}
WAYS = {
    'gradual': {},
    'recipe': {'recipe': 'accurate'},
    'RigL': {'schedule': 'rigl', 'context': 'erk', 'regrow': 'gradient'},
    'SET': {'schedule': 'rigl', 'context': 'erk', 'regrow': 'random'},
    'AC/DC': {'schedule': 'acdc'},
}


def run(data):
    "Yield the errors on the 10,000 test digits."
    packed = np.load(data / 'mnist/mnist.npz')
    train, test = (_digits(packed, part) for part in ('train', 'test'))

    def fit(seed, net=None, epochs=EPOCHS, rate=RATE, **how):
        net = network(seed) if net is None else deepcopy(net)
        learner(net, train, test, BATCH, seed).fit_one_cycle(epochs, rate, cbs=[SparsifyCallback(**how)] if how else None)
        return net, error(net.eval(), test)
    dense = [fit(seed) for seed in range(SEEDS)]
    found = {'dense': [value for _, value in dense]}
    yield averaged('LeNet-300-100', f'dense, {EPOCHS} epochs, error %', found['dense'], '', True, digits=2)
    for sparsity, (name, how) in product(PUBLISHED, WAYS.items()):
        found[name, sparsity] = [fit(seed, sparsity=sparsity, **how)[1] for seed in range(SEEDS)]
        yield averaged('LeNet-300-100', f'{sparsity} %, {name}, {EPOCHS} epochs, error %', found[name, sparsity],
                       PUBLISHED[sparsity], True, digits=2)
    for name in ('gradual', 'recipe'):
        values = [fit(seed, net, LATER, RATE_LATER, sparsity=98, **WAYS[name])[1] for seed, (net, _) in enumerate(dense)]
        found[name, 'trained'] = values
        yield averaged('LeNet-300-100', f'98 %, {name}, {LATER} epochs from the dense network, error %', values,
                       PUBLISHED[98], True, digits=2)
    for cell, where in ((95, 'at 95 %'), (98, 'at 98 %'), ('trained', 'at 98 %, from the dense network')):
        yield from goals('LeNet-300-100 ' + where, found['dense'], found['gradual', cell], found['recipe', cell])
    reached = mean(found['recipe', 98])
    yield Goal('LeNet-300-100 at 98 %: an error of at most 2.0 %', f'{reached:.2f}', reached <= 2.)


def goals(where, dense, gradual, recipe):
    "Yield whether a recipe is ahead of gradual pruning, and makes up for half of its loss against dense; all are errors."
    dense, gradual, recipe = map(mean, (dense, gradual, recipe))
    lost = gradual - dense
    yield Goal(f'{where}: the recipe is ahead of gradual pruning', f'{recipe:.2f} against {gradual:.2f}', recipe < gradual)
    made_up = f'{100 * (gradual - recipe) / lost:.0f} % of {lost:.2f} points' if lost > 0 else 'nothing is lost'
    yield Goal(f'{where}: half of the loss against dense is made up for', made_up, lost <= 0 or 2 * (gradual - recipe) >= lost)
