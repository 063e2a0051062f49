"""The three MONK's problems (Thrun 1991; Hassibi & Stork 1993): how many weights are left without loss of
training accuracy, deleted one by one, without retraining?"""
from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

from experiments.rows import Goal, Row, timed
from experiments.small_nets import loss_func, n_right, train
from fasterai.sparsifier import Sparsifier

SEEDS = 8
DECAY = 3e-3
SIZES = 3, 3, 2, 3, 4, 2  # number of values of each attribute
PROBLEMS = {1: (3, 14, 16), 2: (2, 15, 16), 3: (2, 4, 5)}  # problem: hidden units, weights left in the paper, goal
CRITERIA = 'obs', 'obd', 'magnitude'


def run(data):
    "Yield how many weights are left, the best of the seeds."
    for problem, (hidden, published, goal) in PROBLEMS.items():
        x, y = _cases(data / f'monks/monks-{problem}.train')
        test = _cases(data / f'monks/monks-{problem}.test')
        nets = train(x, y, hidden, SEEDS, 4000, .02, DECAY, .5)
        for criterion in CRITERIA:
            with timed() as clock: pruned = [_pruned(net, criterion, x, y) for net in nets]
            left = [_n_weights(net) for net in pruned]
            best = left.index(min(left))
            accuracy = 100 * n_right(pruned[best], *test) / len(test[1])
            of = sum(p.numel() for p in nets[best].parameters())
            setting = f'{criterion}, weights left of {of} (all seeds: {" ".join(map(str, sorted(left)))}); '
            setting += f'test {accuracy:.1f} %, dense {100 * n_right(nets[best], *test) / len(test[1]):.1f} %'
            paper = str(published) if criterion == 'obs' else ''
            yield Row(f"MONK's {problem}", setting, f'{left[best]}, best of {SEEDS}', paper, SEEDS, '',
                      criterion != 'magnitude', clock.seconds / SEEDS)
            if criterion == 'obs':
                yield Goal(f"MONK's {problem}: OBS leaves at most {goal} weights", str(left[best]),
                           left[best] <= goal)


def _cases(path):
    "Read cases: 17 one-hot inputs, and the class."
    lines = [line.split() for line in path.read_text().splitlines()]
    rows = torch.tensor([[int(word) for word in line[:7]] for line in lines if line and line[0].isdigit()])
    inputs = [F.one_hot(rows[:, i + 1] - 1, size) for i, size in enumerate(SIZES)]
    return torch.cat(inputs, 1).double(), rows[:, 0].double()


def _pruned(net, criterion, x, y):
    "Return the smallest network before the first case is lost."
    right, found, net = n_right(net, x, y), net, deepcopy(net)
    known = {} if criterion == 'magnitude' else dict(data=[(x, y)], loss_func=loss_func)
    sparsifier = Sparsifier(net, criteria=criterion, layers=nn.Linear, min_keep=0, **known)
    n_weights = sum(p.numel() for p in net.parameters())
    for deleted in range(1, n_weights):
        sparsifier.sparsify_model(100 * deleted / n_weights)
        if n_right(net, x, y) < right: break
        found = deepcopy(net)
    return found


def _n_weights(net): return sum(int(p.count_nonzero()) for p in net.parameters())
