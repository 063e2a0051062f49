"""SynFlow (Tanaka et al. 2020) on the shapes of VGG-16 for CIFAR, with initial weights: does it empty a layer
where magnitude does? Whether magnitude does depends on the initial weights: torch's have no large ones in wide
layers; those of He et al. are normal, so that each layer has a few."""
import torch
from torch import nn

from experiments.rows import Goal, Row, timed
from fasterai.sparsifier import Sparsifier

COMPRESSION = 10 ** 2.5
WIDTHS = 64, 64, 'pool', 128, 128, 'pool', 256, 256, 256, 'pool', 512, 512, 512, 'pool', 512, 512, 512
CASES = ('magnitude', 'torch', 1), ('magnitude', 'He', 1), ('synflow', 'torch', 100)  # criterion, initial weights, rounds


def run(data):
    "Yield how many layers are emptied."
    emptied, sparsity = {}, 100 * (1 - 1 / COMPRESSION)
    for criterion, initial, rounds in CASES:
        net = network(initial)
        more = {} if rounds == 1 else {'rounds': rounds}
        with timed() as clock:
            sparsifier = Sparsifier(net, criteria=criterion, min_keep=0, example=torch.ones(1, 3, 32, 32))
            sparsifier.sparsify_model(sparsity, **more)
        layers = sparsifier.layers
        emptied[criterion, initial] = n = sum(not layer.weight.any() for layer in layers.values())
        published = '0 emptied' if criterion == 'synflow' else 'layers emptied'
        yield Row('VGG-16', f'{criterion}, {initial} initial weights, {sparsifier.sparsity:.3f} %, rounds: {rounds}', f'{n} of {len(layers)} emptied',
                  published, seconds=clock.seconds)
    ours, magnitude = (emptied[criterion, 'torch'] for criterion in ('synflow', 'magnitude'))
    yield Goal('SynFlow empties no layer, where magnitude does', f'{ours} and {magnitude} layers',
               ours == 0 and magnitude > 0)


def network(
    initial: str,  # 'torch' or 'He'
) -> nn.Sequential:
    "Return VGG-16 with BatchNorm and one Linear, for pictures of 32 × 32."
    torch.manual_seed(0)
    layers, before = [], 3
    for width in WIDTHS:
        if width == 'pool':
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    for module in net.modules() if initial == 'He' else ():
        if isinstance(module, (nn.Conv2d, nn.Linear)): nn.init.kaiming_normal_(module.weight)
    return net
