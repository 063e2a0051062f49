"""A ResNet-20 of CIFAR-10 without half of its filters, not trained: `shrink` with a repair, beside Torch-Pruning.

`Sparsifier` chooses the filters by magnitude. Torch-Pruning, which must be installed, is given the same numbers and
follows them through the network itself: behind the padded shortcuts it may take others, as many. What `shrink`
returns without a repair lacks exactly those that were chosen."""
from copy import deepcopy

import numpy as np
import torch
import torch_pruning
from torch import nn

from experiments.resnet20 import PICTURES, SEEDS, accuracy, load, pictures
from experiments.rows import Goal, Row, averaged, timed
from fasterai.deploy.shrink import parameters, shrink
from fasterai.sparsifier import Sparsifier

SPARSITY = 50


def run(data):
    "Yield the accuracy of each smaller network, and its parameters."
    folder = data / 'cifar10'
    dense, packed = load(folder), np.load(folder / 'cifar10_5k.npz')
    x, y = pictures(packed['x_test']), torch.tensor(packed['y_test']).long()
    train, example = pictures(packed['x_train']), x[:2]
    pruned = deepcopy(dense)
    Sparsifier(pruned, 'filter', 'local', example=example, coupled=True).sparsify_model(SPARSITY)
    other, plain = _by_torch_pruning(dense, pruned, example), shrink(pruned, example, verbose=False)
    for setting, net in {'dense': dense, 'Torch-Pruning': other, 'shrink, no repair': plain}.items():
        yield _row(setting, net, [accuracy(net, x, y)])
    found, small = [], plain
    with timed() as clock:
        for seed in range(SEEDS):
            drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:PICTURES]
            small = shrink(pruned, example, verbose=False, data=train[drawn].split(40), dense=dense)
            found.append(accuracy(small, x, y))
    repaired = _row('shrink(data=, dense=)', small, found, clock.seconds / SEEDS)
    yield repaired
    above = float(repaired.ours) - max(accuracy(net, x, y) for net in (other, plain))
    yield Goal('ResNet-20, half of the filters: 20 points above Torch-Pruning and above no repair, untrained',
               f'{above:.1f} points', above >= 20)


def _row(setting, net, found, seconds=None) -> Row:
    return averaged('ResNet-20', f'{SPARSITY} % of the filters, {setting}: {parameters(net):,} parameters', found,
                    seconds=seconds)


def _by_torch_pruning(dense, pruned, example):
    "Return the dense network without the filters that are zero in the pruned one."
    small = deepcopy(dense)
    graph = torch_pruning.DependencyGraph().build_dependency(small, example)
    layers = dict(small.named_modules())
    for name, module in pruned.named_modules():
        if not isinstance(module, nn.Conv2d): continue
        if layers[name].out_channels < module.out_channels: continue  # it was cut with another layer
        zero = (~module.weight.flatten(1).any(1)).nonzero().flatten().tolist()
        graph.get_pruning_group(layers[name], torch_pruning.prune_conv_out_channels, idxs=zero).prune()
    return small
