"""Print a digest of the masks, weights and report of random cases and of ten fits, one a line.

A change that should change nothing prints the same lines as the commit before: run it in both checkouts and compare."""
import argparse
import hashlib
import random
import warnings

import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, noop, set_seed
from fastai.callback.schedule import fit_one_cycle  # noqa: F401 a method of Learner from then on
from fastai.callback.training import GradientAccumulation
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.callback import SparsifyCallback
from fasterai.granularity import block, head
from fasterai.schedule import SCHEDULES, iterative
from fasterai.sparsifier import Sparsifier

CONTEXTS = 'local', 'global', 'erk', 'uniform_plus', 'lamp', 'normalized', '2:4', '1:3'
GRANULARITIES = ('weight', 'vector', 'kernel', 'filter', 'channel', 'layer', 'row', 'column', 'horizontal_slice', 'vertical_slice',
                 ('I',), block(4, 4), block(3, 2), head(2), head(2, 'I'))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x): return x + self.second(self.norm(self.first(x)).relu())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.memory = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x): return self.head(self.memory(self.block(self.table(x)))[0][:, -1])


def cnn(draw):
    a, b = draw.choice([4, 6, 8]), draw.choice([6, 8, 12])
    return nn.Sequential(nn.Conv2d(2, a, 3, bias=draw.random() < .5), nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 3, groups=draw.choice([1, 2])),
                         nn.ReLU(), Residual(b), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(b, 6)), torch.randn(2, 2, 10, 10)


def decoder(draw):
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 6, 3, groups=draw.choice([1, 2])), nn.BatchNorm1d(6), nn.ReLU(),
                         nn.Conv1d(6, 4, 1)), torch.randn(2, 3, 9)


def mlp(draw):
    sizes = [draw.choice([5, 8, 16, 33]) for _ in range(draw.choice([2, 3, 4]))]
    layers = [m for a, b in zip([7, *sizes], [*sizes, 4]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(3, 7)


def tokens(draw): return Tokens(), torch.randint(12, (2, 5))


def large(draw): return nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 10)), torch.randn(2, 300)


def digest(model, sparsifier=None):
    "A short hash of every tensor of the model, of the masks and of the report."
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if sparsifier is not None:
        for name, mask in sparsifier.state_dict().items(): found.update(f'{name} {mask["shape"]}'.encode() + mask['bits'].numpy().tobytes())
        report = sparsifier.report()
        found.update(str([(r.layer, r.kind, r.shape, r.weights, r.zeros, r.groups, r.dead) for r in report.rows]).encode())
        found.update(str([report.parameters, report.parameter_zeros, sorted(report.skipped)]).encode())
    return found.hexdigest()[:16]


def scatter(model, draw):
    "Zeros that come in: single weights, ties, or whole filters."
    for weight in model.parameters():
        kind = draw.choice(['none', 'none', 'some', 'ties', 'filters'])
        with torch.no_grad():
            if kind == 'some': weight[torch.rand_like(weight) < draw.random()] = 0
            if kind == 'ties': weight.copy_((weight * 4).round() / 4)
            if kind == 'filters' and weight.ndim > 1: weight[torch.rand(len(weight)) < .4] = 0


def by_position(weight): return weight.float().cumsum(-1).abs()


def case(seed):
    "One random case: a network, choices, and a few events."
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, example = draw.choice([cnn, cnn, decoder, mlp, tokens, large if seed % 8 == 0 else mlp])(draw)
    if draw.random() < .4: scatter(model, draw)
    dtype = draw.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    model = model.to(dtype)
    inputs = example.to(dtype) if example.is_floating_point() else example
    granularity, context = draw.choice(GRANULARITIES), draw.choice(CONTEXTS)
    if ':' in context and draw.random() < .8: granularity = 'weight'
    criteria = draw.choice(['magnitude', 'magnitude', 'gradient', by_position])
    more = {}
    if draw.random() < .2: more['min_keep'] = draw.choice([1, 5, .05, .3])
    if granularity == 'filter' and draw.random() < .5: more['coupled'] = True
    there = [kind for kind in (nn.Linear, nn.Conv2d, nn.Conv1d) if any(isinstance(m, kind) for m in model.modules())]
    layers = draw.choice([None, None, None, there, there[-1], '*'])
    said = []
    try:
        sparsifier = Sparsifier(model, granularity, context, criteria, layers, draw.choice([inputs, lambda: inputs]), **more)
        for _ in range(draw.choice([1, 2, 3])):
            for weight in model.parameters(): weight.grad = torch.randn_like(weight)
            sparsity = draw.choice([0, 10, 33.3, 50, 75, 90, 99.9, 100])
            if ':' in context: sparsity = 50 if context == '2:4' else 66.7
            if draw.random() < .2: sparsity = {draw.choice(list(sparsifier.layers)): sparsity, draw.choice(['*', nn.Linear]): sparsity}
            try: sparsifier.sparsify_model(sparsity, draw.choice([1, 1, .5, .123]), regrow=draw.random() < .4)
            except Exception as error: said.append(type(error).__name__)
            if draw.random() < .1: sparsifier.sparsify_layer(draw.choice(list(sparsifier.layers)), 50 if ':' not in context else sparsity)
            with torch.no_grad():
                for weight in model.parameters(): weight += .1 * torch.randn_like(weight)
            if draw.random() < .5: sparsifier.apply_masks()
            else: sparsifier.load_state_dict(sparsifier.state_dict())
            said.append(digest(model, sparsifier))
    except Exception as error: said.append(type(error).__name__)
    return ' '.join(said)


def fit(seed):
    "A short training with the callback, and a second one without."
    draw = random.Random(seed)
    set_seed(seed)
    x, y = torch.randn(48, 2, 10, 10), torch.randint(0, 6, (48,))
    data = TensorDataset(x, y)
    dls = DataLoaders.from_dsets(data, data, bs=8, num_workers=0, pin_memory=False, device='cpu')
    learn = Learner(dls, cnn(draw)[0], loss_func=CrossEntropyLossFlat())
    learn.remove_cb(learn.progress)
    learn.logger = noop
    granularity = ['weight', 'weight', 'filter', 'kernel', 'filter'][seed % 5]
    more = {'coupled': True} if seed % 10 == 4 else {}
    schedules = [*SCHEDULES, iterative(n_steps=4)]
    schedule = schedules[seed % len(schedules)]
    callback = SparsifyCallback([50, 90, 75][seed % 3], granularity, ['global', 'local', 'erk'][seed % 3] if not more else 'local',
                                ['magnitude', 'gradient'][seed % 2], schedule, **more)
    learn.fit_one_cycle(3, 1e-2, cbs=[callback, *([GradientAccumulation(16)] if seed % 4 == 1 else [])])
    first = digest(learn.model, callback.sparsifier)
    learn.fit(1, 1e-2)
    return f'{first} {digest(learn.model, callback.sparsifier)}'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--cases', type=int, default=2000, help='how many random cases')
    parser.add_argument('--first', type=int, default=0, help='seed of the first case')
    parser.add_argument('--fits', type=int, default=10, help='how many fits')
    chosen = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    for seed in range(chosen.first, chosen.first + chosen.cases): print('case', seed, case(seed), flush=True)
    for seed in range(chosen.fits): print('fit', seed, fit(seed), flush=True)
