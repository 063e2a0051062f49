"""XOR by a 2-2-1 network (Hassibi & Stork 1993): delete one weight, without retraining, and see whether it
still solves XOR."""
from copy import deepcopy

import torch
from torch import nn

from experiments.rows import Goal, Row, timed
from experiments.small_nets import loss_func, n_right, train
from fasterai.sparsifier import Sparsifier

NETWORKS = 200
SEEDS = 400  # about two of three learn XOR
CRITERIA = {'magnitude': 'mostly wrong', 'obd': 'mostly wrong', 'obs': 'right'}
TRAINED = {  # how: steps and weight decay
    'to a minimum, decay 1e-4': (5000, 1e-4),
    'stopped early, no decay': (500, 0.),
}


def run(data):
    "Yield how many of the networks still solve XOR."
    x = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0], dtype=torch.float64)
    shares = {}
    for how, (steps, decay) in TRAINED.items():
        nets = train(x, y, 2, SEEDS, steps, .05, decay, 1.)
        nets = [net for net in nets if n_right(net, x, y) == 4][:NETWORKS]
        for criterion, published in CRITERIA.items():
            with timed() as clock: solved = [_pruned(net, criterion, x, y) for net in nets]
            shares[how, criterion] = 100 * sum(solved) / len(nets)
            error = (shares[how, criterion] * (100 - shares[how, criterion]) / len(nets)) ** .5
            yield Row(f'XOR, {how}', criterion, f'{sum(solved)} of {len(nets)}', published, len(nets),
                      f'{error:.1f} %', criterion != 'magnitude', clock.seconds / len(nets))
    how = next(iter(TRAINED))
    obs, magnitude, obd = (shares[how, criterion] for criterion in ('obs', 'magnitude', 'obd'))
    yield Goal('OBS keeps XOR solved in every case', f'{obs:.1f} %', obs == 100)
    yield Goal('magnitude mostly does not', f'{magnitude:.1f} %', magnitude < 50)
    yield Goal('OBD mostly does not', f'{obd:.1f} %', obd < 50)


def _pruned(net, criterion, x, y):
    "Tell whether XOR is solved after one weight was deleted."
    net = deepcopy(net)
    known = {} if criterion == 'magnitude' else dict(data=[(x, y)], loss_func=loss_func)
    Sparsifier(net, criteria=criterion, layers=nn.Linear, min_keep=0, **known).sparsify_model(100 / 9)
    return n_right(net, x, y) == 4
