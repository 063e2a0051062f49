"""How fast zeros run on a CPU: whole networks with unstructured zeros, by `speed_up`, against torch's better layout.

BatchNorms are folded in the dense networks too. Times are taken side by side, in a random order each round; a ratio is the median of the rounds'
ratios. `--data DIR` is a folder with `cifar10/` with the pictures and the ResNet-20; without it the rows of the trained ResNet-20 are left out. Run it
on a machine that does nothing else."""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from experiments.resnet20 import load, pictures
from results import RESULTS, machine, table, write
from torch import nn
from torch.nn import functional as F
from torchvision.models import mobilenet_v2, resnet18, resnet50

from fasterai.arguments import Inputs
from fasterai.deploy import kernels, speed_up
from fasterai.deploy.compare import outputs
from fasterai.deploy.folding import fold_norms
from fasterai.deploy.timing import side_by_side
from fasterai.sparsifier import Sparsifier

warnings.filterwarnings('ignore')
# what holds torch's libraries and the kernels to AVX2
AVX2 = {'ATEN_CPU_CAPABILITY': 'avx2', 'ONEDNN_MAX_CPU_ISA': 'AVX2', 'MKL_ENABLE_INSTRUCTIONS': 'AVX2', 'FASTERAI_KERNELS': 'avx2'}


# Networks

class Attention(nn.Module):
    def __init__(self, width, heads=12):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention, self.up, self.down = Attention(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


def encoder(width=384): return nn.Sequential(*(Layer(width) for _ in range(6)))


def mlp(width): return nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def pruned(model, sparsity):
    "A network with random weights and the same sparsity in each layer."
    model.eval()
    Sparsifier(model, context='local').sparsify_model(sparsity)
    return model


def trained(model, x, y, sparsity, epochs, path):
    "A network that `SparsifyCallback` has pruned while it trained."
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat
    from torch.utils.data import TensorDataset

    from fasterai.callback import SparsifyCallback
    data = TensorDataset(x, y)
    dls = DataLoaders.from_dsets(data, data, bs=64, num_workers=0, device='cpu')
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), path=path)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-3, cbs=SparsifyCallback(sparsity))
    return model.eval()


def cifar(folder, count):
    "Normalized images and labels, and the ResNet-20."
    data = np.load(folder / 'cifar10/cifar10_5k.npz')
    labels = torch.from_numpy(data['y_train'][:count]).long()
    return pictures(data['x_train'][:count]), labels, load(folder / 'cifar10')


# Times

def ratio(model, x, seconds, tries):
    "How many times as fast as the better dense layout a network is by `speed_up`, and the milliseconds of both."
    fast = speed_up(model, x, verbose=False, seconds=tries)
    inputs = Inputs((x,))
    dense = fold_norms(model, inputs, outputs(model, inputs))
    last = deepcopy(dense).to(memory_format=torch.channels_last)
    x_last = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
    with torch.no_grad(): *old, new = side_by_side([partial(dense, x), partial(last, x_last), partial(fast, x)], seconds)
    better = min(old, key=lambda latency: latency.seconds)
    return median(a / b for a, b in zip(better.rounds, new.rounds)), 1e3 * better.seconds, 1e3 * new.seconds


class Rows:
    "Rows of the table; `least` is the smallest ratio of all."

    def __init__(self, seconds, tries): self.seconds, self.tries, self.rows, self.least = seconds, tries, [], float('inf')

    def add(self, what, goal, model, x, threads=1):
        torch.set_num_threads(threads)
        found, old, new = ratio(model, x, self.seconds, self.tries)
        self.least = min(self.least, found)
        asked = f'at least {goal} ×' if goal else 'report'
        many = 'one thread' if threads == 1 else f'{threads} threads'
        self.rows.append((f'{what}, {many}', asked, f'{found:.2f} × ({old:.2f} → {new:.2f} ms)', 'yes' if found >= goal else 'no'))
        print(*self.rows[-1], sep=' | ', flush=True)


def image_networks(rows, side, small):
    x, batch = torch.randn(1, 3, side, side), torch.randn(2 if small else 8, 3, side, side)
    for sparsity, one, two, eight, eight_two in ((90, 5, 4.6, 3.8, 4.2), (95, 6.5, 5.5, 5, 5.5)):
        name = f'ResNet-18, {sparsity} %, {side} px'
        model = pruned(resnet18(), sparsity)
        rows.add(f'{name}, batch 1', one, model, x)
        if small: return
        rows.add(f'{name}, batch 1', two, model, x, threads=2)
        rows.add(f'{name}, batch 8', eight, model, batch)
        rows.add(f'{name}, batch 8', eight_two, model, batch, threads=2)
    for sparsity, goal in ((90, 4.5), (95, 5.5)):
        rows.add(f'ResNet-50, {sparsity} %, {side} px, batch 1', goal, pruned(resnet50(), sparsity), x)


def trained_networks(rows, folder, side, small):
    count, epochs = (64, 1) if small else (4000, 4)
    for sparsity, goal in ((90, 2), (95, 3)):
        with tempfile.TemporaryDirectory() as path:
            if folder:
                x, y, model = cifar(folder, count)
                rows.add(f'ResNet-20 trained to {sparsity} %, 32 px, batch 1', goal, trained(model, x, y, sparsity, epochs, path), x[:1])
                rows.add(f'ResNet-20 trained to {sparsity} %, 32 px, batch 64', goal, model, x[:64])
            if small: return
            # a few steps: the pattern is that of training, the weights are of no use
            x, y = torch.randn(64, 3, side, side), torch.randint(0, 10, (64,))
            model = trained(mobilenet_v2(num_classes=10), x, y, sparsity, 3, path)
            rows.add(f'MobileNetV2 trained to {sparsity} %, {side} px, batch 1', goal, model, x[:1])


def linear_networks(rows, width, small):
    rows.add(f'MLP 784-{width}-{width}-10, 95 %, batch 64', 8, pruned(mlp(width), 95), torch.randn(64, 784))
    for batch in (1,) if small else (1, 32):
        rows.add(f"MiniLM's encoder, Linears 90 %, batch {batch}, sequence 64", 2.5, pruned(encoder(), 90), torch.randn(batch, 64, 384))


def held_to_avx2(rows):
    for sparsity, goal in ((90, 4), (95, 5)):
        rows.add(f'ResNet-18, {sparsity} %, 224 px, batch 1, AVX2 only', goal, pruned(resnet18(), sparsity), torch.randn(1, 3, 224, 224))


# Other engines, where they are installed

def openvino(model, x):
    import openvino as ov
    settings = {'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'INFERENCE_PRECISION_HINT': 'f32', 'PERFORMANCE_HINT': 'LATENCY'}
    compiled = ov.Core().compile_model(ov.convert_model(model, example_input=x), 'CPU', settings)
    return lambda: compiled(x.numpy())


# DeepSparse needs an old numpy, so it runs in a process of its own, which computes whenever it is told to
SERVER = """
import sys, numpy
from deepsparse import Engine
path, x = sys.argv[1], numpy.load(sys.argv[2])
engine = Engine(path, batch_size=len(x), num_cores=int(sys.argv[3]))
for line in sys.stdin:
    engine.run([x])
    print('done', flush=True)
"""


def deepsparse(python, model, x):
    folder = Path(tempfile.mkdtemp())
    torch.onnx.export(model, (x,), str(folder / 'model.onnx'), dynamo=False, opset_version=13)
    np.save(folder / 'x.npy', x.numpy())
    command = [python, '-c', SERVER, str(folder / 'model.onnx'), str(folder / 'x.npy'), str(torch.get_num_threads())]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def call():
        server.stdin.write('\n')
        server.stdin.flush()
        while line := server.stdout.readline():
            if line == 'done\n': return
        raise RuntimeError('DeepSparse has ended')
    return call


def engines(rows, side, python):
    torch.set_num_threads(1)
    for name, make in (('OpenVINO f32', openvino), ('DeepSparse', partial(deepsparse, python))):
        for sparsity in (90, 95):
            model, x = pruned(resnet18(), sparsity), torch.randn(1, 3, side, side)
            what = f'{name}, ResNet-18, {sparsity} %, batch 1, one thread'
            try: other = make(model, x)
            except Exception as error:
                rows.rows.append((what, 'ahead', f'not measured: {type(error).__name__}', 'no'))
                continue
            fast = speed_up(model, x, verbose=False, seconds=rows.tries)
            with torch.no_grad(): old, new = side_by_side([other, partial(fast, x)], rows.seconds)
            found = median(a / b for a, b in zip(old.rounds, new.rounds))
            rows.rows.append((what, 'ahead', f'{found:.2f} × ({1e3 * old.seconds:.2f} → {1e3 * new.seconds:.2f} ms)', 'yes' if found > 1 else 'no'))


def processor():
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')), 'a processor without a name')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--small', action='store_true', help='small networks and little time: for a test, not for figures')
    parser.add_argument('--data', type=Path, help='a folder with cifar10/')
    parser.add_argument('--deepsparse', default=sys.executable, help='a Python that has DeepSparse')
    parser.add_argument('--avx2', action='store_true', help='print the rows of AVX2 alone; called by the script itself')
    parser.add_argument('--out', type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    seconds, tries, side, width = (.02, .01, 32, 128) if chosen.small else (8, .3, 224, 4096)
    rows = Rows(seconds, tries)
    if chosen.avx2:
        held_to_avx2(rows)
        return print(json.dumps(rows.rows))
    image_networks(rows, side, chosen.small)
    linear_networks(rows, width, chosen.small)
    trained_networks(rows, chosen.data, side, chosen.small)
    rows.rows.append(('the slowest of these', 'at least 0.97 ×', f'{rows.least:.2f} ×', 'yes' if rows.least >= .97 else 'no'))
    if not chosen.small:
        engines(rows, side, chosen.deepsparse)
        done = subprocess.run([sys.executable, __file__, '--avx2'], env=os.environ | AVX2, capture_output=True, text=True, check=True)
        rows.rows += json.loads(done.stdout.splitlines()[-1])
    note = '' if kernels.library() else f' Without kernels: {kernels.why_not()}.'
    text = f'By `make bench`{" --small, no figures to go by" if chosen.small else ""}; {processor()}; {machine()}.{note}\n\n'
    write('Zeros that run', text + table(rows.rows), chosen.out)


if __name__ == '__main__': main()
