"Train a small network on handwritten digits and prune it in several ways: `python -m fasterai.demo`."
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

# fastai itself causes this one, when it is imported beside a new PyTorch
warnings.filterwarnings('ignore', '.*torch.jit.script', FutureWarning)

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
from fasterai.deploy import payoff, save_sparse, shrink, speed_up
from fasterai.plot import CROSS, DEAD, GAP, WIDTH, label_ends, plot_kernels
from fasterai.report import Report
from fasterai.sparsifier import Sparsifier
from fasterai.tables import as_text

# the colour-blind can tell these apart (Okabe & Ito 2008)
BLUE, VERMILION, GREEN, ORANGE = '#0072B2', '#D55E00', '#009E73', '#E69F00'
MAX_SEED = 2 ** 32 - 1


# ---- The data and the network

def digits(
    seed: int,  # of the split
) -> tuple:  # (training set, validation set): images (1, 8, 8) from 0 to 1, and classes
    "Load the 1,797 handwritten digits that come with scikit-learn, a quarter of them for validation."
    images, classes = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    classes = torch.tensor(classes)
    parts = train_test_split(range(len(classes)), test_size=.25, stratify=classes, random_state=seed)
    return tuple(TensorDataset(images[part], classes[part]) for part in parts)


def conv_block(inputs: int, outputs: int, stride: int) -> nn.Module:
    "Build a convolution, a BatchNorm and a ReLU."
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs), relu=nn.ReLU()))


def network() -> nn.Module:
    "Build a small convolutional network: 56,224 weights in three convolutions and a Linear."
    return nn.Sequential(OrderedDict(
        block1=conv_block(1, 32, 1),
        block2=conv_block(32, 64, 2),
        block3=conv_block(64, 64, 2),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        output=nn.Linear(64, 10)))


def digits_learner(
    build=network,  # function that returns the network
    seed: int = 0,  # of its weights and of the order of the digits; the split is always the same
) -> Learner:
    """Build a Learner of a small network and the digits, which trains on the CPU in some seconds.

    Set torch to one thread, enough for so small a network; sums are then the same on any number of cores."""
    torch.set_num_threads(1)
    set_seed(seed)
    return _learner(build(), digits(seed=0))


def _learner(model, datasets):
    dls = DataLoaders.from_dsets(*datasets, bs=64, num_workers=0, device=torch.device('cpu'))
    return Learner(dls, model, loss_func=nn.functional.cross_entropy, metrics=accuracy)


# ---- The trainings

class Run(NamedTuple):
    "Hold the results of one training."
    name: str
    asked: float | None  # the sparsity that was asked for, in percent; None for the dense network
    model: nn.Module  # the trained network
    report: Report  # of its zeros
    accuracy: float  # percent of the validation digits
    seconds: float  # of training
    course: list  # (epochs done, percent of zeros) after each step
    accuracies: list  # percent of the validation digits, after each epoch


class Course(Callback):
    "Record the sparsity after each step."
    order = SparsifyCallback.order + 1

    def __init__(self, sparsify): self.sparsify, self.points = sparsify, []

    def after_step(self):
        epochs = self.epoch + (self.iter + 1) / self.n_iter
        self.points.append((epochs, self.sparsify.sparsifier.sparsity))


def callbacks(
    sparsity: float,  # percent of the weights, of the runs that prune single weights
) -> dict:  # {name of a run: callback, or None for the dense network}
    """List the trainings that the demo compares.

    Filters are pruned within each layer, so that each layer becomes half as wide and none a bottleneck."""
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
    datasets: tuple,  # (training set, validation set)
    start: nn.Module,  # the initial network, which is left as it is
    epochs: int,
    seed: int,  # of the order of the digits
) -> Run:
    "Train once; every run starts from the same weights and sees the digits in the same order."
    print(f'training: {name}', flush=True)
    set_seed(seed)
    learn = _learner(deepcopy(start), datasets)
    course = Course(sparsify)
    with learn.no_bar(), learn.no_logging():
        began = perf_counter()
        learn.fit_one_cycle(epochs, 1e-2, cbs=[sparsify, course] if sparsify else None)
        seconds = perf_counter() - began
        # the losses of training and validation come before the accuracy
        accuracies = [100 * values[2] for values in learn.recorder.values]
        final_accuracy = 100 * learn.validate()[1]
    asked = sparsify.sparsity if sparsify else None
    sparsifier = sparsify.sparsifier if sparsify else Sparsifier(learn.model)
    report = sparsifier.report()
    return Run(name, asked, learn.model, report, final_accuracy, seconds, course.points, accuracies)


def table(
    runs: list,  # of `Run`
) -> str:
    "Return a table with one line for each run, and below it the layers that were left out of the counts."
    lines = [('run', 'asked', 'measured sparsity', 'weights left', 'validation accuracy', 'seconds')]
    for r in runs:
        asked = '' if r.asked is None else f'{r.asked:g} %'
        left = f'{r.report.weights - r.report.zeros:,} of {r.report.weights:,}'
        measured = f'{r.report.sparsity:.2f} %', left, f'{r.accuracy:.2f} %', f'{r.seconds:.1f}'
        lines.append((r.name, asked, *measured))
    notes = [f'{r.name}: left alone: {layer}: {reason}'
             for r in runs for layer, reason in r.report.skipped.items()]
    return '\n'.join([as_text(lines), *notes])


# ---- The pictures

def draw_training(
    dense: Run,
    sparse: Run,  # one with a course
    left: dict,  # {heading of a network: {measure: percent of the dense network that is left}}
) -> Figure:
    "Draw weights and accuracy over training, and below them the sizes and times of pruned networks."
    figure = Figure(figsize=(WIDTH, 5.6), layout='constrained')
    curves, bars = figure.subplots(2, height_ratios=(1, .9))
    _draw_course(curves, dense, sparse)
    _draw_left(bars, left)
    return figure


def _draw_course(ax, dense, sparse):
    "Draw the weights that are left, and the accuracy, over training."
    times, zeros = zip((0, 0), *sparse.course)
    left = [100 - share for share in zeros]
    epochs = range(1, len(dense.accuracies) + 1)
    ax.fill_between(times, left, step='post', color=DEAD, alpha=.5, lw=0)
    ax.step(times, left, where='post', color=CROSS, label=f'weights: {left[-1]:.0f} %')
    ax.plot(epochs, sparse.accuracies, color=BLUE, marker='o', ms=4,
            label=f'accuracy: {sparse.accuracy:.1f} %')
    ax.plot(epochs, dense.accuracies, color=VERMILION, ls='--', label=f'dense: {dense.accuracy:.1f} %')
    ax.set_title('Weights fall while the network trains', loc='left')
    ax.set(xlabel='epoch', ylabel='%', xlim=(0, times[-1]), ylim=(0, 103))
    ax.xaxis.get_major_locator().set_params(integer=True)
    label_ends(ax)


def _draw_left(ax, left):
    "Draw a bar for each measure of the pruned networks, in percent of the dense one, below its heading."
    places, names, shares = [], [], []
    place = 0
    for heading, measures in left.items():
        ax.text(0, place, heading, transform=ax.get_yaxis_transform(), va='center', weight='bold')
        for name, share in measures.items():
            place += 1
            places.append(place)
            names.append(name)
            shares.append(share)
        place += 1.2
    bars = ax.barh(places, shares, color=BLUE, height=.7)
    ax.bar_label(bars, [f'{share:.0f} %' for share in shares], padding=3)
    ax.set_yticks(places, names)
    ax.tick_params(left=False)
    ax.axvline(100, color=CROSS, ls='--', lw=1)
    ax.set(xlabel='of the dense network (%)', xlim=(0, max(100, *shares) * 1.1), ylim=(place - .6, -.6))
    ax.spines[['top', 'right']].set_visible(False)
    ax.set_title('What is left of two networks', loc='left')


def draw_schedules(
    runs: list,  # of `Run`, three with a course
) -> Figure:
    "Draw sparsity over training, a curve for each run."
    figure = Figure(figsize=(9, 4.2), layout='constrained')
    ax = figure.subplots()
    for run, colour, line in zip(runs, (BLUE, VERMILION, GREEN), ('-', '--', '-.')):
        times, zeros = zip((0, 0), *run.course)
        label = f'{run.name}: {run.accuracy:.2f} % accuracy'
        ax.step(times, zeros, where='post', color=colour, ls=line, lw=2.5, label=label)
    title = 'Three ways to the same sparsity, counted in the weights after each training step'
    last = runs[0].course[-1][0]
    ax.set_title(title, loc='left')
    ax.set(xlabel='epoch', ylabel='weights that are zero (%)', xlim=(0, last), ylim=(-3, 103))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(loc='lower right', bbox_to_anchor=(1, .1))
    ax.grid(alpha=.3)
    return figure


def draw_layers(
    runs: dict,  # {title: `Run`}
) -> Figure:
    "Draw the sparsity of each layer, a picture for each run."
    sizes = [len(run.report.rows) for run in runs.values()]
    figure = Figure(figsize=(9, 1.8 + .5 * sum(sizes)), layout='constrained')
    pictures = figure.subplots(len(runs), height_ratios=sizes)
    for ax, (title, run) in zip(pictures, runs.items()):
        run.report.plot(ax=ax).set_title(title, loc='left')
    return figure


class Example(NamedTuple):
    "Say how one group of a granularity is drawn where six kernels of 3 × 3 lie side by side."
    colour: str
    meaning: str  # for the legend
    size: tuple  # (width, height), in cells


EXAMPLES = {
    'weight': Example(BLUE, 'one number', (1, 1)),
    'vector': Example(VERMILION, 'one row of a kernel', (3, 1)),
    'kernel': Example(GREEN, 'one filter, one channel', (3, 3)),
    'filter': Example(ORANGE, 'all kernels of one output', (6 * 3 + 5 * GAP, 3)),
}


def draw_granularities(
    model: nn.Module,  # a dense network, which is left as it is
    name: str = 'block2.conv',  # of the layer
) -> Figure:
    "Draw the kernels of one layer, and which of their weights are pruned at each granularity."
    figure = Figure(figsize=(9, 6.6), layout='constrained')
    figure.get_layout_engine().set(w_pad=.12, h_pad=.1)
    figure.suptitle(f'Half of the weights of {name} zeroed, in four granularities '
                    '(the first 6 × 6 of its 64 × 32 kernels)')
    dense, *sparse, key = figure.subplots(2, 3).flat
    weight = model.get_submodule(name).weight
    plot_kernels(weight, ax=dense).set_title('dense', loc='left')
    handles = []
    for row, (granularity, ax) in enumerate(zip(EXAMPLES, sparse), start=1):
        _draw_pruned(ax, model, name, granularity)
        handles.append(_mark_group(dense, granularity, row))
    handles.append(Patch(facecolor=DEAD, edgecolor=CROSS, hatch='xxx', label='zero'))
    key.axis('off')
    key.legend(handles=handles, loc='center', frameon=False, labelspacing=1)
    figure.colorbar(dense.collections[0], ax=key, location='bottom', label='value of a weight', pad=0)
    return figure


def _draw_pruned(ax, model, name, granularity):
    "Draw a layer's kernels, with half of the weights pruned at a granularity."
    pruned = deepcopy(model)
    Sparsifier(pruned, granularity, layers=name).sparsify_model(50)
    keep = pruned.get_submodule(name).weight != 0
    plot_kernels(model.get_submodule(name).weight, keep, ax=ax)
    ax.set_title(granularity, loc='left', color=EXAMPLES[granularity].colour, weight='bold')
    ax.set(xlabel='', ylabel='')


def _mark_group(ax, granularity, row):
    "Draw a frame around one group, in a row of kernels, and return it for the legend."
    colour, meaning, (width, height) = EXAMPLES[granularity]
    corner = (0, row * (3 + GAP))
    frame = Rectangle(corner, width, height, fill=False, ec=colour, lw=2.5,
                      label=f'{granularity}: {meaning}', clip_on=False)
    return ax.add_patch(frame)


# ---- The savings

def payoffs(
    dense: Run,
    weights: Run,  # one whose single weights were pruned
    filters: Run,  # one whose filters were pruned
    digits: TensorDataset,  # of the validation
    file: Path,  # where the network without single weights is saved
) -> dict:  # {title: `deploy.payoff` of a pruned network against the dense one}
    "Remove filters; save and speed up the network without single weights; measure what each saves."
    images, classes = digits.tensors
    example = images[:64]
    small = shrink(filters.model, example)
    save_sparse(weights.model, file)
    batches = list(zip(images.split(64), classes.split(64)))
    fast = speed_up(weights.model, example, verbose=False)
    pruned = {f'{filters.name}, {filters.asked:g} %, shrunk': small,
              f'{weights.name}, {weights.asked:g} %, saved packed': weights.model,
              f'{weights.name}, {weights.asked:g} %, sped up': fast}
    return {title: payoff(dense.model, model, example, dls=batches, seconds=1)
            for title, model in pruned.items()}


def draw_payoffs(
    found: dict,  # of `payoffs`
) -> Figure:
    "Draw what is left of the dense network, a picture for each pruned one."
    figure = Figure(figsize=(9, 9.6), layout='constrained')
    for ax, (title, one) in zip(figure.subplots(len(found)), found.items()):
        one.plot(ax=ax).set_title(title, loc='left')
    return figure


def shares_left(
    weights: Run,  # one whose single weights were pruned
    filters: Run,  # one whose filters were pruned
    found: dict,  # of `payoffs`
) -> dict:  # {heading of a network: {measure: percent of the dense network}}
    "Return the sizes and times of the pruned networks that sum up the demo."
    shrunk, saved, fast = (one.to_frame().set_index('what').ratio for one in found.values())
    time = 'latency, batch 64'
    return {
        f'{weights.asked:g} % of weights zero': {
            'weights': 100 - weights.report.sparsity,
            'file': 100 * saved['file, packed by save_sparse'],
            'time': 100 * fast[time]},
        f'{filters.asked:g} % of filters removed': {
            'parameters': 100 * shrunk['parameters'],
            'time': 100 * shrunk[time]},
    }


# ---- The program

def options(
    arguments: list | None = None,  # as on the command line; None for the command line
):
    "Read and check the options; end the program with one line where one is wrong."
    parser = ArgumentParser('python -m fasterai.demo', description=__doc__,
                            formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument('--epochs', type=int, default=12, help='of each training')
    parser.add_argument('--sparsity', type=float, default=90,
                        help='percent of zeros, of the runs that zero single weights')
    parser.add_argument('--out', type=Path, default='demo', help='folder for the pictures')
    parser.add_argument('--seed', type=int, default=0,
                        help='of the split, the initial weights and the order of the digits')
    chosen = parser.parse_args(arguments)
    if chosen.epochs < 1:
        parser.error(f'--epochs: got {chosen.epochs}, expected an integer of 1 or more')
    if not 0 <= chosen.seed <= MAX_SEED:
        parser.error(f'--seed: got {chosen.seed}, expected an integer from 0 to {MAX_SEED}')
    try: percent(chosen.sparsity, '--sparsity')
    except ValueError as error: parser.error(str(error))
    try: chosen.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f'--out: got {str(chosen.out)!r}, which cannot be made a folder: {error.strerror}')
    return chosen


def main(arguments=None):
    "Train the networks, print the tables and draw the pictures."
    chosen = options(arguments)
    torch.set_num_threads(1)  # enough for so small a network; and sums are then the same on any number of cores
    datasets = digits(chosen.seed)
    set_seed(chosen.seed)
    start = network()
    runs = [train(name, sparsify, datasets, start, chosen.epochs, chosen.seed)
            for name, sparsify in callbacks(chosen.sparsity).items()]
    dense, *pruned, filters = runs
    weights = pruned[0]
    print('\n' + table(runs) + '\n')
    file = chosen.out / 'weights.safetensors'
    found = payoffs(dense, weights, filters, datasets[1], file)
    for title, one in found.items(): print(f'\n{title}, against the dense network\n{one}')
    layers = {f'{weights.name}: the lowest {weights.asked:g} % of the whole network': weights,
              f'{filters.name}: the lowest {filters.asked:g} % of each layer, in whole filters': filters}
    pictures = {
        'schedules.png': draw_schedules(pruned),
        'layers.png': draw_layers(layers),
        'granularity.png': draw_granularities(dense.model),
        'training.png': draw_training(dense, weights, shares_left(weights, filters, found)),
        'payoff.png': draw_payoffs(found),
    }
    sharper = {'training.png': 130}  # the narrow one
    for name, picture in pictures.items(): picture.savefig(chosen.out / name, dpi=sharper.get(name, 100))
    names = ', '.join(str(chosen.out / name) for name in pictures)
    print('\npictures:', names, f'and {file}')


if __name__ == '__main__': main()
