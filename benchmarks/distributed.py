"""Measure what an event costs where each process has a part of the model: CPU time, exchanges and bytes.

    python benchmarks/distributed.py [--small]

The processes share this machine and speak over its loopback (gloo), so only CPU times and counts are told, no wall times."""
import argparse
import os
import pickle
import tempfile
import time
import warnings
from pathlib import Path

import results
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fasterai.peers import Shards, digest
from fasterai.shards import here, is_split
from fasterai.sparsifier import Sparsifier

EVENTS = {  # what: (rules, sparsity, dtype)
    'global': ({}, 90, torch.float32),
    'local': ({'context': 'local'}, 90, torch.float32),
    'global, gradient': ({'criteria': 'gradient'}, 90, torch.float32),
    'global, bfloat16': ({}, 90, torch.bfloat16),
    '2:4, gathered': ({'context': '2:4'}, 50, torch.float32),
    'filter, local, gathered': ({'context': 'local', 'granularity': ('I', 'kh', 'kw')}, 50, torch.float32),
}
RUNS = 4  # the first one counts bytes


def resnet50():
    "The convolutions and the last layer of ResNet-50: 25,502,912 weights."
    yield nn.Conv2d(3, 64, 7, bias=False)
    came = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for i in range(blocks):
            yield nn.Conv2d(came, width, 1, bias=False)
            yield nn.Conv2d(width, width, 3, bias=False)
            yield nn.Conv2d(width, 4 * width, 1, bias=False)
            if i == 0: yield nn.Conv2d(came, 4 * width, 1, bias=False)
            came = 4 * width
    yield nn.Conv2d(2048, 1000, 1, bias=False)


def small():
    for _ in range(3): yield nn.Conv2d(64, 64, 3, bias=False)


MODELS = {'small': small, 'resnet50': resnet50}
WEIGHTS = {'small': '110,592', 'resnet50': '25,502,912 (ResNet-50)'}


def built(layers, dtype, n):
    "A model, and what gives its weights back. A layer is split as soon as it is made, so that no process has two whole ones."
    torch.manual_seed(0)
    mesh, model = init_device_mesh('cpu', (n,)), nn.ModuleList()
    for layer in layers:
        model.append(layer.to(dtype))
        if n > 1: fully_shard(layer, mesh=mesh)
        layer.weight.grad = layer.weight.detach().cos()
    saved = [here(p).clone() for p in model.parameters()]

    def restore():
        for p, value in zip(model.parameters(), saved): here(p).copy_(value)
    return model, restore


class Counting:
    "Count exchanges, and the bytes that this process receives of others."

    def __enter__(self):
        self.exchanges, self.bytes, self.gathered, self.whole = 0, 0, Shards.gathered, Shards.whole
        Shards.gathered, Shards.whole = lambda *args: self._gathered(*args), lambda *args: self._whole(*args)
        return self

    def __exit__(self, *_): Shards.gathered, Shards.whole = self.gathered, self.whole

    def _gathered(self, peers, *args):
        told = self.gathered(peers, *args)
        self.exchanges += 1
        sizes = [len(pickle.dumps(one)) for one in told]
        self.bytes += sum(sizes) - sizes[distributed.get_rank()]
        return told

    def _whole(self, peers, tensor):
        found = self.whole(peers, tensor)
        if is_split(tensor): self.bytes += (found.numel() - here(tensor).numel()) * found.element_size()
        return found


def measured(layers, rules, sparsity, dtype, n):
    "Make an event a few times: exchanges, bytes, best CPU seconds, and a digest of the masks."
    model, restore = built(layers, dtype, n)
    best, counts, found = float('inf'), None, None
    for run in range(RUNS):
        restore()
        sparsifier = Sparsifier(model, **rules)
        if run == 0:
            with Counting() as counts: sparsifier.sparsify_model(sparsity)
            masks = sparsifier.masks
            found = [digest(masks[name].full_tensor() if n > 1 else masks[name]) for name in masks]
            continue
        start = time.process_time()
        sparsifier.sparsify_model(sparsity)
        best = min(best, time.process_time() - start)
    return counts.exchanges, counts.bytes, best, found


def run(rank, n, size, names, folder):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    os.environ['GLOO_SOCKET_IFNAME'] = 'lo'
    distributed.init_process_group('gloo', f'file://{folder}/store{n}', rank=rank, world_size=n)
    found = {name: measured(MODELS[size](), *EVENTS[name], n) for name in names}
    torch.save(found, f'{folder}/{n}.{rank}')
    distributed.destroy_process_group()


def of_all(n, size, names):
    "What the processes have measured, the most of any: {event: (exchanges, bytes, seconds, digests)}."
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (n, size, names, folder), nprocs=n)
        of_ranks = [torch.load(f'{folder}/{n}.{rank}', weights_only=False) for rank in range(n)]
    return {name: tuple(max(of_rank[name][i] for of_rank in of_ranks) for i in range(4)) for name in names}


def lines(size, names, numbers=(1, 2, 4)):
    "Rows of the table for one size and these numbers of processes; the masks must be those of one process."
    found = {n: of_all(n, size, names) for n in numbers}
    for name in names:
        assert all(of_n[name][3] == found[1][name][3] for of_n in found.values()), name
        cells = [f'{1000 * of_n[name][2]:,.0f}' for of_n in found.values()]
        received = [f'{of_n[name][1] / 1e6:,.2f}' for n, of_n in found.items() if n > 1]
        yield f'| {WEIGHTS[size]} | {name} | {found[2][name][0]} | {" | ".join(received)} | {" | ".join(cells)} |'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--small', action='store_true', help='a small model, to see that it runs')
    parser.add_argument('--out', type=Path, default=results.RESULTS)
    args = parser.parse_args()
    numbers = (1, 2) if args.small else (1, 2, 4)
    if args.small: found = [*lines('small', ['global', '2:4, gathered'], numbers)]
    else: found = [*lines('resnet50', list(EVENTS))]
    received, cpu = (' | '.join(f'{what}, {n}' for n in numbers[first:]) for what, first in (('MB received', 1), ('CPU ms', 0)))
    head = [f'| weights | event | exchanges, 2 processes | {received} | {cpu} |', '|---' * (2 * len(numbers) + 2) + '|']
    text = (f'By `benchmarks/distributed.py`, on {results.machine()}. Each process has one thread and a part of each layer (`fully_shard`); they share the machine. '
            'One event from dense to 90 % (50 % of 2:4 and of filters). The masks are, to the bit, those of one process with the whole model. Bytes are those that a process receives of the others; CPU time is the '
            'best of three events, of the slowest process. The columns are for so many processes; with 1 it has the whole model.\n\n' + '\n'.join(head + found))
    results.write('Parts of a model', text, args.out)


if __name__ == '__main__': main()
