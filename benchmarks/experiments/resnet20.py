"""A ResNet-20 of CIFAR-10, the 18 convolutions of its blocks pruned in one event, without training.

The published figures are of another ResNet-20 and of all 10,000 test pictures: WoodFisher (Singh & Alistarh
2020), CBS (Yu et al. 2022), CHITA (Benbaki et al. 2023); they use labels, the repair does not."""
from copy import deepcopy
from itertools import product

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from experiments.rows import Goal, averaged, timed
from fasterai.repair import recalibrate, refit
from fasterai.sparsifier import Sparsifier

PICTURES = 160  # to calibrate with
SEEDS = 3  # draws of the pictures, for `AVERAGED`; one for the others
AVERAGED = ('magnitude', 'refit + batchnorm'), ('alps', '+ batchnorm')
SPARSITIES = 50, 70, 80, 90
PUBLISHED = {  # sparsity: WoodFisher, CBS, CHITA
    50: (90.23, 90.58, 90.60), 70: (81.05, 81.84, 84.12),
    80: (62.63, 51.28, 57.90), 90: (11.49, 13.68, 15.60),
}
REPAIRS = {'no repair': (), 'batchnorm': (recalibrate,), 'refit': (refit,),
           'refit + batchnorm': (refit, recalibrate),
           'its own refit': (), '+ batchnorm': (recalibrate,)}
CRITERIA = {  # criterion: context, and the repairs that are tried; the last two solve the weights themselves
    'magnitude': ('global', ('no repair', 'batchnorm', 'refit', 'refit + batchnorm')),
    'wanda': ('local', ('no repair', 'refit + batchnorm')),
    'ria': ('local', ('no repair', 'refit + batchnorm')),
    'sparsegpt': ('global', ('its own refit', '+ batchnorm')),
    'alps': ('global', ('its own refit', '+ batchnorm')),
}
MEAN, DEVIATION = (.485, .456, .406), (.229, .224, .225)


class Block(nn.Module):
    "Add two convolutions to a shortcut that has no weights."

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.added = stride, (after - before) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)

    def shortcut(self, x):
        if self.stride == 1: return x
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.added, self.added))


class ResNet20(nn.Module):
    "Build the network that `cifar10/resnet20-12fca82f.th` has the weights of."

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def load(folder) -> ResNet20:
    "Return the network with its weights."
    saved = torch.load(folder / 'resnet20-12fca82f.th', weights_only=True, map_location='cpu')
    saved = saved.get('state_dict', saved)
    net = ResNet20()
    net.load_state_dict({name.removeprefix('module.'): value for name, value in saved.items()})
    return net.eval()


def pictures(array) -> torch.Tensor:
    "Return pictures as the network takes them."
    x = torch.tensor(array).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


@torch.no_grad()
def accuracy(net, x, y) -> float:
    "Return the percentage of pictures that are classified as they are."
    found = torch.cat([net(part).argmax(1) for part in x.split(250)])
    return 100 * float((found == y).float().mean())


def run(data):
    "Yield the accuracy for each criterion, repair and sparsity."
    folder = data / 'cifar10'
    dense, packed = load(folder), np.load(folder / 'cifar10_5k.npz')
    x, y = pictures(packed['x_test']), torch.tensor(packed['y_test']).long()
    train = pictures(packed['x_train'])
    drawn = [torch.Generator().manual_seed(seed) for seed in range(SEEDS)]
    batches = [train[torch.randperm(len(train), generator=g)[:PICTURES]].split(40) for g in drawn]
    yield averaged('ResNet-20', 'dense', [accuracy(dense, x, y)])
    found, slowest = {}, 0.
    for sparsity, (criterion, repair) in product(SPARSITIES, _pairs()):
        seeds = SEEDS if (criterion, repair) in AVERAGED else 1
        with timed() as clock:
            nets = [_pruned(dense, criterion, repair, sparsity, some) for some in batches[:seeds]]
        setting = f'{sparsity} %, {criterion} ({CRITERIA[criterion][0]}), {repair}'
        row = averaged('ResNet-20', setting, [accuracy(net, x, y) for net in nets], _published(sparsity),
                       seconds=clock.seconds / seeds)
        slowest = max(slowest, row.seconds)
        found[sparsity, criterion, repair] = float(row.ours)
        yield row
    for sparsity in (70, 80, 90):
        goal = max(PUBLISHED[sparsity])
        pairs = [(found[sparsity, criterion, repair], f'{criterion}, {repair}') for criterion, repair in AVERAGED]
        yield Goal(f'ResNet-20 at {sparsity} %: above all published ({goal}), without labels',
                   '; '.join(f'{reached} ({how})' for reached, how in pairs), pairs[0][0] > goal)
    yield Goal('ResNet-20: pruning and repair in less than a minute', f'{slowest:.0f} s at most', slowest < 60)


def _pairs(): return [(criterion, repair) for criterion, (_, repairs) in CRITERIA.items() for repair in repairs]


def _published(sparsity): return ' / '.join(map(str, PUBLISHED[sparsity]))


def _pruned(dense, criterion, repair, sparsity, batches):
    net = deepcopy(dense)
    names = [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and name != 'conv1']
    known = {} if criterion == 'magnitude' else dict(data=batches)
    Sparsifier(net, 'weight', CRITERIA[criterion][0], criterion, layers=names, **known).sparsify_model(sparsity)
    for function in REPAIRS[repair]: function(net, dense, batches)
    return net
