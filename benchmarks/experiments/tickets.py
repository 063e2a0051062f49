"""Lottery tickets of LeNet-300-100 on MNIST (Frankle & Carbin 2019): 21 % of the weights are left after three rounds, each
trained from the initial weights, beside dense, new initial weights and random masks."""
from statistics import mean

import numpy as np

from experiments.fits import learner
from experiments.lenet import _digits, network
from experiments.rows import Goal, averaged
from fasterai.tickets import ANEW, SHUFFLED, TICKET, find_ticket

SEEDS, EPOCHS, BATCH, RATE = 3, 2, 100, .1
SPARSITY, ROUNDS = 79, 3


def run(data):
    "Yield the errors on the 10,000 test digits."
    packed = np.load(data / 'mnist/mnist.npz')
    train, test = (_digits(packed, part) for part in ('train', 'test'))
    found = [_ticket(seed, train, test) for seed in range(SEEDS)]
    errors = {name: [100 * (1 - one.values[key]) for one in found]
              for name, key in (('dense', (TICKET, 0)), *((what, (what, ROUNDS)) for what in (TICKET, ANEW, SHUFFLED)))}
    for name, values in errors.items():
        how = 'dense' if name == 'dense' else f'{SPARSITY} %, {name}'
        yield averaged('LeNet-300-100', f'{how}, {EPOCHS} epochs, error %', values, '', True, digits=2)
    dense, ticket, anew = (mean(errors[name]) for name in ('dense', TICKET, ANEW))
    yield Goal('a ticket with 21 % of the weights is ahead of dense', f'{ticket:.2f} against {dense:.2f}', ticket < dense)
    yield Goal('its masks with new initial weights are behind dense', f'{anew:.2f} against {dense:.2f}', anew > dense)


def _ticket(seed, train, test):
    learn = learner(network(seed), train, test, BATCH, seed)
    others = network(SEEDS + seed).state_dict()
    return find_ticket(learn, lambda learn: learn.fit_one_cycle(EPOCHS, RATE), sparsity=SPARSITY, rounds=ROUNDS,
                       initialize=lambda net: net.load_state_dict(others))
