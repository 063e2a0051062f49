"""A trained ResNet-20, the 18 convolutions of its blocks pruned while it is fine-tuned on 4,000 pictures of CIFAR-10.

The learning rates were chosen on the last 1,000 of them; what the recipe has was chosen on MNIST. The network has seen all
of them, and is measured on 1,000 test pictures, of which one standard error is about 1.5 points."""
from itertools import product

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from experiments.accurate import goals
from experiments.fits import learner
from experiments.resnet20 import accuracy, load, pictures
from experiments.rows import averaged
from fasterai.callback import SparsifyCallback

SEEDS, EPOCHS, BATCH = 2, 2, 64
SPARSITIES = 95, 98
WAYS = {'gradual': (.1, {}), 'recipe': (.05, {'recipe': 'accurate'})}  # learning rate, and what the callback is given


def run(data):
    "Yield the accuracy on the test pictures."
    folder = data / 'cifar10'
    packed = np.load(folder / 'cifar10_5k.npz')
    train, test = ((pictures(packed[f'x_{part}']), torch.tensor(packed[f'y_{part}']).long()) for part in ('train', 'test'))
    dense = accuracy(load(folder), *test)
    yield averaged('ResNet-20', 'dense, as it comes, accuracy %', [dense], '', True)
    found = {}
    for sparsity, (name, (rate, how)) in product(SPARSITIES, WAYS.items()):
        found[name, sparsity] = [_fine_tuned(folder, train, test, seed, sparsity, rate, how) for seed in range(SEEDS)]
        yield averaged('ResNet-20', f'{sparsity} %, {name}, {EPOCHS} epochs, accuracy %', found[name, sparsity], '', True)
    for sparsity in SPARSITIES:
        errors = [[100 - value for value in found[name, sparsity]] for name in WAYS]
        yield from goals(f'ResNet-20 at {sparsity} %, error %', [100 - dense], *errors)


def _fine_tuned(folder, train, test, seed, sparsity, rate, how):
    net = load(folder).to(memory_format=torch.channels_last)
    names = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and n.startswith('layer')]
    callback = SparsifyCallback(sparsity, layers=names, **how)
    few = tuple(tensor[:2] for tensor in test)  # it is measured once, at the end
    learner(net, train, few, BATCH, seed, _moved).fit_one_cycle(EPOCHS, rate, cbs=callback)
    return accuracy(net.eval(), *test)


def _moved(x):
    "Flip half of the pictures, and move a batch by up to 4 pixels."
    flip = (torch.rand(len(x)) < .5).view(-1, 1, 1, 1)
    down, right = torch.randint(9, (2,)).tolist()
    x = F.pad(torch.where(flip, x.flip(3), x), (4,) * 4)[:, :, down:down + 32, right:right + 32]
    return x.contiguous(memory_format=torch.channels_last)
