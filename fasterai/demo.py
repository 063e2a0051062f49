"Handwritten digits, a small network, and what can go from it: `python -m fasterai.demo`."
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

warnings.filterwarnings('ignore', '.*torch.jit.script', FutureWarning)  # fastai's own, when it is imported beside a new PyTorch

import torch
from fastai.basics import Callback, DataLoaders, Learner, accuracy, set_seed
from fastai.callback import progress, schedule  # noqa: F401 (they give a Learner no_bar and fit_one_cycle)
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from fasterai.arguments import percent
from fasterai.callback import SparsifyCallback
from fasterai.deploy import payoff, save_sparse, shrink
from fasterai.plot import CROSS, DEAD, GAP, plot_kernels
from fasterai.report import Report
from fasterai.sparsifier import Sparsifier
from fasterai.tables import as_text

BLUE, VERMILION, GREEN, ORANGE = '#0072B2', '#D55E00', '#009E73', '#E69F00'  # told apart by the colour-blind (Okabe & Ito 2008)


class Run(NamedTuple):
    "What came of one training."
    name: str
    asked: float | None  # percent, None for the dense network
    model: nn.Module
    report: Report
    accuracy: float  # percent of the validation digits
    seconds: float  # of training
    course: list  # (epochs done, percent of zeros) after each step
    accuracies: list  # percent, after each epoch


class Course(Callback):
    "Counts the zeros after each step."
    order = SparsifyCallback.order + 1

    def __init__(self, sparsify): self.sparsify, self.points = sparsify, []

    def after_step(self): self.points.append((self.epoch + (self.iter + 1) / self.n_iter, self.sparsify.sparsifier.sparsity))


def digits(
    seed: int,  # of the split
) -> tuple:  # training set, validation set: images (1, 8, 8) from 0 to 1, and classes
    "The 1,797 handwritten digits that come with scikit-learn, a quarter of them for validation."
    images, classes = load_digits(return_X_y=True)
    images, classes = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes)
    parts = train_test_split(range(len(classes)), test_size=.25, stratify=classes, random_state=seed)
    return tuple(TensorDataset(images[part], classes[part]) for part in parts)


def conv_block(inputs: int, outputs: int, stride: int) -> nn.Module:
    "Convolution, BatchNorm, ReLU."
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs), relu=nn.ReLU()))


def network() -> nn.Module:
    "A small convolutional network: 56,224 weights in three convolutions and a Linear."
    return nn.Sequential(OrderedDict(block1=conv_block(1, 32, 1), block2=conv_block(32, 64, 2), block3=conv_block(64, 64, 2),
                                     pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), output=nn.Linear(64, 10)))


def callbacks(
    sparsity: float,  # percent, where single weights go
) -> dict:  # name of a run: callback
    "What is trained. The filters compete within their layer, so that each becomes half as wide and none a bottleneck."
    weights = {'granularity': 'weight', 'context': 'global', 'criteria': 'magnitude'}
    filters = {'granularity': 'filter', 'context': 'local', 'criteria': 'magnitude'}
    return {
        'dense': None,
        'weight, gradual': SparsifyCallback(sparsity, **weights, schedule='gradual'),
        'weight, one-shot': SparsifyCallback(sparsity, **weights, schedule='one_shot'),
        'weight, iterative': SparsifyCallback(sparsity, **weights, schedule='iterative'),
        'filter, gradual': SparsifyCallback(50, **filters, schedule='gradual'),
    }


def train(
    name: str,  # of the run
    sparsify: SparsifyCallback | None,  # None leaves the network dense
    datasets: tuple,  # training set, validation set
    start: nn.Module,  # the initial network, which is left as it is
    epochs: int,
    seed: int,  # of the order of the digits
) -> Run:
    "Train once, from the same weights and in the same order each time."
    print(f'training: {name}', flush=True)
    set_seed(seed)
    dls = DataLoaders.from_dsets(*datasets, bs=64, num_workers=0, device=torch.device('cpu'))
    learn = Learner(dls, deepcopy(start), loss_func=nn.functional.cross_entropy, metrics=accuracy)
    course = Course(sparsify)
    with learn.no_bar(), learn.no_logging():
        began = perf_counter()
        learn.fit_one_cycle(epochs, 1e-2, cbs=[sparsify, course] if sparsify else None)
        seconds = perf_counter() - began
        accuracies = [100 * values[2] for values in learn.recorder.values]  # after the losses of training and validation
        right = 100 * learn.validate()[1]
    sparsifier = sparsify.sparsifier if sparsify else Sparsifier(learn.model)
    return Run(name, sparsify and sparsify.sparsity, learn.model, sparsifier.report(), right, seconds, course.points, accuracies)


def table(
    runs: list,  # of `Run`
) -> str:
    "One line a run, and what was left out of the counts."
    lines = [('run', 'asked', 'measured sparsity', 'weights left', 'validation accuracy', 'seconds')]
    for r in runs:
        asked = '' if r.asked is None else f'{r.asked:g} %'
        left = f'{r.report.weights - r.report.zeros:,} of {r.report.weights:,}'
        lines.append((r.name, asked, f'{r.report.sparsity:.2f} %', left, f'{r.accuracy:.2f} %', f'{r.seconds:.1f}'))
    notes = [f'{r.name}: left alone: {layer}: {reason}' for r in runs for layer, reason in r.report.skipped.items()]
    return '\n'.join([as_text(lines), *notes])


def draw_training(
    dense: Run,
    sparse: Run,  # one with a course
    left: dict,  # what: percent that is left of it
) -> Figure:
    "Zeros and accuracy over training, and what is left in the end."
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    figure.get_layout_engine().set(wspace=.06)
    ax, bars = figure.subplots(1, 2, width_ratios=(1.7, 1))
    times, zeros = zip((0, 0), *sparse.course)
    epochs = range(1, len(dense.accuracies) + 1)
    ax.fill_between(times, zeros, step='post', color=DEAD)
    ax.text(times[-1] * .97, zeros[-1] / 2, f'weights that are zero: {zeros[-1]:.0f} %', ha='right', va='center')
    ax.plot(epochs, dense.accuracies, color=ORANGE, ls='--', marker='o', ms=4, label=f'dense: {dense.accuracy:.1f} % accuracy')
    ax.plot(epochs, sparse.accuracies, color=BLUE, marker='o', ms=4, label=f'with the callback: {sparse.accuracy:.1f} % accuracy')
    ax.set_title('While it trains', loc='left')
    ax.set(xlabel='epoch', ylabel='%', xlim=(0, times[-1] * 1.02), ylim=(0, 103))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc='lower right', framealpha=1)
    bars.bar_label(bars.barh(list(left), list(left.values()), color=BLUE, height=.6), [f'{v:.0f} %' for v in left.values()], padding=3)
    bars.axvline(100, color='#606060', ls='--', lw=1)
    bars.invert_yaxis()
    bars.set(xlabel='of the dense network (%)', xlim=(0, 105))
    bars.set_title('What is left of two networks', loc='left')
    for a in (ax, bars): a.spines[['top', 'right']].set_visible(False)
    return figure


def draw_schedules(
    runs: list,  # of `Run`, three with a course
) -> Figure:
    "Sparsity over training."
    figure = Figure(figsize=(9, 4.2), layout='constrained')
    ax = figure.subplots()
    for run, colour, line in zip(runs, (BLUE, VERMILION, GREEN), ('-', '--', '-.')):
        ax.step(*zip((0, 0), *run.course), where='post', color=colour, ls=line, lw=2.5, label=f'{run.name}: {run.accuracy:.2f} % accuracy')
    ax.set_title('Three ways to the same sparsity, counted in the weights after each training step', loc='left')
    ax.set(xlabel='epoch', ylabel='weights that are zero (%)', xlim=(0, runs[0].course[-1][0]), ylim=(-3, 103))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc='lower right', bbox_to_anchor=(1, .1))
    ax.grid(alpha=.3)
    return figure


def draw_layers(
    runs: dict,  # title: `Run`
) -> Figure:
    "Sparsity of each layer."
    sizes = [len(run.report.rows) for run in runs.values()]
    figure = Figure(figsize=(9, 1.8 + .5 * sum(sizes)), layout='constrained')
    for ax, (title, run) in zip(figure.subplots(len(runs), height_ratios=sizes), runs.items()):
        run.report.plot(ax=ax).set_title(title, loc='left')
    return figure


# A group of each granularity: its colour, what it is, and (width, height) in the picture, where six kernels of 3 × 3 lie side by side.
GRAINS = {
    'weight': (BLUE, 'one number', (1, 1)),
    'vector': (VERMILION, 'one row of a kernel', (3, 1)),
    'kernel': (GREEN, 'one filter, one channel', (3, 3)),
    'filter': (ORANGE, 'all kernels of one output', (6 * 3 + 5 * GAP, 3)),
}


def draw_granularities(
    model: nn.Module,  # a dense network, which is left as it is
    name: str = 'block2.conv',  # of the layer
) -> Figure:
    "One layer's kernels, and which of them go at each granularity."
    figure = Figure(figsize=(9, 6.6), layout='constrained')
    figure.get_layout_engine().set(w_pad=.12, h_pad=.1)
    figure.suptitle(f'Half of the weights of {name} zeroed, in four granularities (the first 6 × 6 of its 64 × 32 kernels)')
    dense, *sparse, key = figure.subplots(2, 3).flat
    weight = model.get_submodule(name).weight
    plot_kernels(weight, ax=dense).set_title('dense', loc='left')
    handles = []
    for row, (ax, (granularity, (colour, what, size))) in enumerate(zip(sparse, GRAINS.items())):
        pruned = deepcopy(model)
        Sparsifier(pruned, granularity, layers=name).sparsify_model(50)
        plot_kernels(weight, pruned.get_submodule(name).weight != 0, ax=ax).set_title(granularity, loc='left', color=colour, weight='bold')
        ax.set(xlabel='', ylabel='')
        corner = (0, (row + 1) * (3 + GAP))
        handles.append(dense.add_patch(Rectangle(corner, *size, fill=False, ec=colour, lw=2.5, label=f'{granularity}: {what}', clip_on=False)))
    handles.append(Patch(facecolor=DEAD, edgecolor=CROSS, hatch='xxx', label='zero'))
    key.axis('off')
    key.legend(handles=handles, loc='center', frameon=False, labelspacing=1)
    figure.colorbar(dense.collections[0], ax=key, location='bottom', label='value of a weight', pad=0)
    return figure


def accounts(
    dense: Run,
    weights: Run,  # one whose single weights went
    filters: Run,  # one whose filters went
    digits: TensorDataset,  # of the validation
    file: Path,  # where the one with single weights is saved
) -> dict:  # title: what the zeros brought
    "The filters that are zero removed, the single weights saved packed, and what came of both."
    images, classes = digits.tensors
    small = shrink(filters.model, images[:64])
    save_sparse(weights.model, file)
    batches = list(zip(images.split(64), classes.split(64)))
    return {f'{name}': payoff(dense.model, model, images[:64], dls=batches, seconds=1) for name, model in (
        (f'{filters.name}, {filters.asked:g} %, shrunk', small), (f'{weights.name}, {weights.asked:g} %, saved packed', weights.model))}


def draw_accounts(
    found: dict,  # of `accounts`
) -> Figure:
    "What is left of the dense network."
    figure = Figure(figsize=(9, 6.6), layout='constrained')
    for ax, (title, one) in zip(figure.subplots(len(found)), found.items()): one.plot(ax=ax).set_title(title, loc='left')
    return figure


def options(
    arguments: list | None = None,  # None for the command line
):
    "What was asked for; ends the program where it cannot be meant."
    parser = ArgumentParser('python -m fasterai.demo', description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument('--epochs', type=int, default=12, help='of each training')
    parser.add_argument('--sparsity', type=float, default=90, help='percent of zeros, of the runs that zero single weights')
    parser.add_argument('--out', type=Path, default='demo', help='folder for the pictures')
    parser.add_argument('--seed', type=int, default=0, help='of the split, the initial weights and the order of the digits')
    chosen = parser.parse_args(arguments)
    if chosen.epochs < 1: parser.error(f'--epochs: got {chosen.epochs}, allowed is a whole number from 1 on')
    if not 0 <= chosen.seed < 2 ** 32: parser.error(f'--seed: got {chosen.seed}, allowed is a whole number from 0 to {2 ** 32 - 1}')
    try: percent(chosen.sparsity, '--sparsity')
    except ValueError as error: parser.error(str(error))
    try: chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as error: parser.error(f'--out: got {str(chosen.out)!r}, which cannot be made a folder: {error.strerror}')
    return chosen


def main(arguments=None):
    "Train, print the table, draw the pictures."
    chosen = options(arguments)
    torch.set_num_threads(1)  # enough for so small a network; and sums then come out the same on any number of cores
    datasets = digits(chosen.seed)
    set_seed(chosen.seed)
    start = network()
    runs = [train(name, sparsify, datasets, start, chosen.epochs, chosen.seed) for name, sparsify in callbacks(chosen.sparsity).items()]
    dense, *weights, filters = runs
    pictures = {
        'schedules.png': draw_schedules(weights),
        'layers.png': draw_layers({f'{weights[0].name}: the lowest {weights[0].asked:g} % of the whole network': weights[0],
                                   f'{filters.name}: the lowest {filters.asked:g} % of each layer, in whole filters': filters}),
        'granularity.png': draw_granularities(dense.model),
    }
    print('\n' + table(runs) + '\n')
    packed = chosen.out / 'weights.safetensors'
    found = accounts(dense, weights[0], filters, datasets[1], packed)
    for title, one in found.items(): print(f'\n{title}, against the dense network\n{one}')
    shrunk, saved = (one.to_frame().set_index('what').ratio for one in found.values())
    some, half = f'{weights[0].asked:g} % of weights zero:', f'{filters.asked:g} % of filters removed:'
    left = {f'{some}\nweights': 1 - weights[0].report.sparsity / 100, f'{some}\nfile': saved['file, packed by save_sparse'],
            f'{half}\nparameters': shrunk['parameters'], f'{half}\nmultiply-adds': shrunk['multiply-adds']}
    pictures['training.png'] = draw_training(dense, weights[0], {what: 100 * ratio for what, ratio in left.items()})
    pictures['payoff.png'] = draw_accounts(found)
    for name, picture in pictures.items(): picture.savefig(chosen.out / name, dpi=100)
    print('\npictures:', ', '.join(str(chosen.out / name) for name in pictures), f'and {packed}')


if __name__ == '__main__': main()
