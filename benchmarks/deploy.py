"What zeros turn into: file, network, layers; `make bench` writes the table to benchmarks/RESULTS.md. Times are taken side by side, in turn."
import argparse
import copy
import os
import tempfile
import warnings
from pathlib import Path

import torch
from results import RESULTS, machine, table, write
from torch import nn
from torchvision.models import resnet18

from fasterai.deploy import save_sparse, shrink, speed_up
from fasterai.deploy.shrink import parameters
from fasterai.deploy.timing import side_by_side
from fasterai.sparsifier import Sparsifier

warnings.filterwarnings('ignore')


def file():
    "Bytes of a packed network with 90 % zeros, of the dense bytes."
    model = resnet18().eval()
    Sparsifier(model, context='local').sparsify_model(90)
    dense = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    with tempfile.TemporaryDirectory() as folder:
        save_sparse(model, Path(folder) / 'packed')
        share = os.path.getsize(Path(folder) / 'packed') / dense
    return 'file: ResNet-18, 90 % zeros, of the dense bytes', 'at most 14 %', f'{100 * share:.1f} %', share <= .14


def times(dense, sparse, x, seconds):
    with torch.no_grad(): old, new = side_by_side([lambda: dense(x), lambda: sparse(x)], seconds)
    return old, new


def network(side, batch, seconds):
    "Parameters and time of a ResNet-18 without half of its filters."
    dense, x = resnet18().eval(), torch.randn(batch, 3, side, side)
    model = copy.deepcopy(dense)
    Sparsifier(model, 'filter', 'local', example=x, coupled=True).sparsify_model(50)
    small = shrink(model, x, verbose=False)
    share = parameters(small) / parameters(dense)
    old, new = times(dense, small, x, seconds)
    yield 'network: ResNet-18, half of its filters, parameters left', 'at most 30 %', f'{100 * share:.1f} %', share <= .3
    yield (f'the same, {side} px, batch {batch}', 'at least 2.5 × as fast', f'{old.seconds / new.seconds:.2f} × ({1e3 * old.seconds:.1f} → '
           f'{1e3 * new.seconds:.1f} ms)', old.seconds / new.seconds >= 2.5)


def layers(width, seconds):
    "Time of an MLP with 95 % zeros."
    dense, x = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)).eval(), torch.randn(64, 784)
    Sparsifier(dense, context='local').sparsify_model(95)
    fast = speed_up(dense, x, seconds=seconds)
    old, new = times(dense, fast, x, seconds)
    return (f'layers: MLP 784-{width}-{width}-10, 95 % zeros, batch 64', 'at least 3 × as fast',
            f'{old.seconds / new.seconds:.2f} × ({1e3 * old.seconds:.1f} → {1e3 * new.seconds:.1f} ms)', old.seconds / new.seconds >= 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--small', action='store_true', help='small networks and little time: for a test, not for figures')
    parser.add_argument('--out', type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    seconds, side, batch, width = (.05, 32, 2, 256) if chosen.small else (8, 224, 8, 4096)
    rows = [file(), *network(side, batch, seconds), layers(width, seconds)]
    text = f'By `make bench`{" --small, no figures to go by" if chosen.small else ""}; {machine()}.\n\n'
    write('What zeros turn into', text + table([(*row[:3], 'yes' if row[3] else 'no') for row in rows]), chosen.out)


if __name__ == '__main__': main()
