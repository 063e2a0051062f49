"""How well `fit_to` keeps a budget, and what its choice is worth beside one sparsity for all layers and one global threshold.

Latencies are by `speed_up`, on the processor that the script runs on; that of a rival is met by bisection of its sparsity, measured each time. All networks are
pruned in one shot. `--data DIR` is a folder with `cifar10/` with the pictures and the ResNet-20; without it its rows are left out. Run it on a machine that does
nothing else."""
import argparse
import warnings
from copy import deepcopy
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from experiments.resnet20 import PICTURES, accuracy, load, pictures
from kernels import encoder
from results import RESULTS, machine, table, write
from torch import nn
from torchvision.models import resnet18

from fasterai.costs import Clock
from fasterai.fit_to import fit_to
from fasterai.sparsifier import Sparsifier

warnings.filterwarnings('ignore')
REPAIR = 'refit', 'batchnorm'
TIMES = 2, 3  # as fast as dense
SHARES = .5, .2  # of the bytes of the dense file
STEPS = 7  # of the bisection of a rival's sparsity
AHEAD = 3  # points of accuracy that are the goal
MOST_SECONDS = 120  # to choose, for the ResNet-20


def latency_rows(name, model, x, data, seconds):
    "Latency that is asked for and met."
    dense = Clock(model, x, seconds).ms
    for times in TIMES:
        what = f'{name}: {times} × as fast'
        try: found = fit_to(model, x, data, ms=dense / times, seconds=seconds)
        except ValueError as error:
            yield what, 'within 5 %', str(error), 'no'
            continue
        off = found.reached / found.asked - 1
        yield what, 'within 5 %', f'asked {found.asked:.3f} ms, met {found.reached:.3f} ms ({100 * off:+.1f} %)', 'yes' if abs(off) <= .05 else 'no'


def file_rows(name, model, x, data):
    "Bytes that are asked for and met."
    size = fit_to(model, x, data, bytes=1e12).dense
    for share in SHARES:
        found = fit_to(model, x, data, bytes=round(share * size))
        left = 1 - found.reached / found.asked
        yield (f'{name}: {share:g} of the bytes', 'never more, within 3 %', f'asked {found.asked:,.0f}, met {found.reached:,.0f} ({100 * left:.2f} % less)',
               'yes' if 0 <= left <= .03 else 'no')


def rival(dense, context, asked, clock, data, layers):
    "A network that is pruned by a context to the same measured latency, and repaired; its sparsity and latency."
    low, high, tried = 0., 99., []
    for _ in range(STEPS):
        sparsity = (low + high) / 2
        model = deepcopy(dense)
        Sparsifier(model, context=context, layers=layers).sparsify_model(sparsity)
        ms = clock(model)
        tried.append((abs(ms - asked), sparsity, ms))
        if ms > asked: low = sparsity
        else: high = sparsity
    _, sparsity, ms = min(tried)
    model = deepcopy(dense)
    Sparsifier(model, context=context, layers=layers, data=data, repair=REPAIR).sparsify_model(sparsity)
    return model, sparsity, ms


def accuracy_rows(folder, batch, count, seconds):
    "Accuracy of the ResNet-20 at the same measured latency, and the time to choose."
    dense, packed = load(folder / 'cifar10'), np.load(folder / 'cifar10/cifar10_5k.npz')
    test, y = pictures(packed['x_test'][:count]), torch.tensor(packed['y_test'][:count]).long()
    train = pictures(packed['x_train'])
    data = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:PICTURES]].split(40)
    x = train[:batch]
    clock = Clock(dense, x, seconds)
    name, slowest, fastest = f'ResNet-20, batch {batch}', 0., clock.ms
    yield f'{name}: dense', 'report', f'{accuracy(dense, test, y):.1f} % right, {fastest:.3f} ms', ''
    for times in TIMES:
        start = perf_counter()
        try: found = fit_to(dense, x, data, ms=fastest / times, repair=REPAIR, seconds=seconds)
        except ValueError as error:
            yield f'{name}: {times} × as fast', 'within 5 %', str(error), 'no'
            continue
        slowest, off = max(slowest, perf_counter() - start), found.reached / found.asked - 1
        yield (f'{name}: {times} × as fast', 'within 5 %', f'asked {found.asked:.3f} ms, met {found.reached:.3f} ms ({100 * off:+.1f} %)',
               'yes' if abs(off) <= .05 else 'no')
        ours = accuracy(found.model.eval(), test, y)
        for rivals, context in (('uniform', 'local'), ('global', 'global')):
            model, sparsity, ms = rival(dense, context, found.reached, clock, data, list(found.sparsities))
            theirs = accuracy(model.eval(), test, y)
            yield (f'{name}: {times} × as fast, right', f'{AHEAD} points above {rivals}',
                   f'{ours:.1f} % at {found.reached:.3f} ms, {rivals} {theirs:.1f} % at {ms:.3f} ms (zeros: {found.sparsity:.1f} and {sparsity:.1f} %)',
                   'yes' if ours >= theirs + AHEAD else 'no')
    yield f'{name}: to choose and repair', f'less than {MOST_SECONDS} s', f'{slowest:.0f} s at most', 'yes' if slowest < MOST_SECONDS else 'no'
    yield from file_rows('ResNet-20', dense, x, data)


def rows(chosen):
    "All rows, as they are measured."
    if chosen.small:
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        data = [torch.randn(8, 64) for _ in range(4)]
        yield from latency_rows('MLP 64-128-64', model, data[0], data, .01)
        yield from file_rows('MLP 64-128-64', model, data[0], data)
        return
    x = torch.randn(1, 3, 64, 64)
    yield from latency_rows('ResNet-18, 64 px, batch 1', resnet18().eval(), x, [torch.randn(4, 3, 64, 64) for _ in range(4)], .3)
    data = [torch.randn(2, 64, 384) for _ in range(4)]
    yield from latency_rows("MiniLM's encoder, batch 1, sequence 64", encoder().eval(), data[0][:1], data, .3)
    if not chosen.data: return
    for batch in (1, 64): yield from accuracy_rows(chosen.data, batch, 5000, .3)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--small', action='store_true', help='a small network and little time: for a test, not for figures')
    parser.add_argument('--data', type=Path, help='a folder with cifar10/')
    parser.add_argument('--out', type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    found = []
    for row in rows(chosen):
        found.append(row)
        print(*row, sep=' | ', flush=True)
    text = f'By `python benchmarks/budgets.py`{" --small, no figures to go by" if chosen.small else ""}; {machine()}.\n\n'
    write('Budgets', text + table(found), chosen.out)


if __name__ == '__main__': main()
