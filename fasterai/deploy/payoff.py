"Measure what zeros have brought: parameters, multiply-adds, bytes, latency, accuracy."
import tempfile
import zlib
from collections.abc import Iterable
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from fasterai.arguments import Inputs, seconds_of, whole
from fasterai.deploy.compare import check_copyable, example_inputs, outputs, plain_tensors
from fasterai.deploy.files import save_sparse
from fasterai.deploy.kernels import SparseConv, SparseLinearKernel
from fasterai.deploy.speed_up import SparseLinear
from fasterai.deploy.timing import faster, side_by_side
from fasterai.snapshot import evaluation_mode
from fasterai.tables import Shown

SPARSE = SparseLinear, SparseConv, SparseLinearKernel  # layers that store the weights that are not zero
COUNTS = 'parameters', 'non-zero parameters', 'multiply-adds', 'multiply-adds with a weight that is not zero'
FILES = 'file, dense', 'file, zipped', 'file, packed by save_sparse'
COUNTED, TIMED = '#0072B2', '#D55E00'  # colours of the bars
NO_SPEED = ('The zeros bring no speed here: a dense layer multiplies by zero as by any number. '
            'shrink() removes whole filters that are zero, speed_up() has faster forms '
            'of layers with 60 % zeros or more on a CPU, and of the pattern 2:4 on a GPU.')
NO_ZEROS = 'There are no zeros, and nothing was removed.'


@dataclass(frozen=True, repr=False)
class Payoff(Shown):
    "Hold what `payoff` measured of two networks; prints as a table, shows as HTML in a notebook."
    rows: tuple  # tuples (what, unit, dense, sparse)
    spread: dict  # {what: ((low, high) of dense, (low, high) of sparse)}, the middle half of the times, in seconds
    notes: tuple  # sentences on what the rows mean

    def _cells(self):
        yield 'what', 'dense', 'sparse', 'sparse / dense'
        for what, unit, dense, sparse in self.rows:
            cells = [_formatted(dense, unit), _formatted(sparse, unit)]
            if what in self.spread:
                cells = [_with_range(c, *bounds, unit) for c, bounds in zip(cells, self.spread[what])]
            ratio = f'{sparse / dense:.3f}' if dense else ''
            yield what, *cells, ratio

    def _lines(self): return self.notes

    def to_frame(self):
        "Return a pandas DataFrame, one row for each thing that was measured."
        import pandas as pd
        frame = pd.DataFrame(self.rows, columns=['what', 'unit', 'dense', 'sparse'])
        return frame.assign(ratio=frame['sparse'] / frame['dense'])

    def plot(self, ax=None):
        "Draw what is left of each thing, in percent of the dense network, and return the matplotlib axes."
        rows = [row for row in self.rows if row[1] != '%' and row[2]]
        names = [what for what, *_ in rows]
        shares = [100 * (sparse / dense) for *_, dense, sparse in rows]
        if ax is None:
            import matplotlib.pyplot as plt
            _, ax = plt.subplots(figsize=(6.5, 1 + .32 * len(rows)), layout='constrained')
        colours = [TIMED if what in self.spread else COUNTED for what in names]
        bars = ax.barh(names, shares, color=colours)
        ax.bar_label(bars, [f'{share:.1f} %' for share in shares], padding=3, fontsize='small')
        ax.axvline(100, color='#606060', ls='--', lw=1)
        ax.invert_yaxis()
        longest = max(100, *shares)
        ax.set(xlabel='left of the dense network (%)', xlim=(0, 1.18 * longest))  # room for the labels
        ax.spines[['top', 'right']].set_visible(False)
        return ax


def payoff(
    dense: nn.Module,  # the network before pruning
    sparse: nn.Module,  # the network after it: with zeros, shrunk, or sped up
    example,  # a batch as both take it: a tuple for several inputs, a dict for keywords; its items are repeated for other batch sizes
    dls=None,  # fastai DataLoaders, or batches of (x, y), for the accuracy
    batches: tuple = (1, 64),  # batch sizes at which the latency is measured
    seconds: float = 2.,  # time to spend on each batch size, about
) -> Payoff:
    "Measure two networks side by side: parameters, multiply-adds, files, latency, accuracy."
    check_copyable(dense, 'dense')
    check_copyable(sparse, 'sparse')
    seconds, batches, dls = seconds_of(seconds), _read_batch_sizes(batches), _read_dls(dls)
    inputs, models = example_inputs(example, dense), (deepcopy(dense), deepcopy(sparse))
    plain_tensors(inputs, 'their items are repeated for other batch sizes')
    for model in models: outputs(model, inputs)  # an error of the model's own comes first
    accuracies = () if dls is None else [_accuracy(m, dls) for m in models]  # its errors come before the times
    counts = [_counts(m, inputs) for m in models]
    rows = [(what, '', *of_both) for what, of_both in zip(COUNTS, zip(*counts))]
    rows += [(what, 'B', *of_both) for what, of_both in zip(FILES, zip(*map(_file_sizes, models)))]
    spread, comparisons = {}, []
    for size in batches:
        old, new = _latencies(models, _batch(inputs, size), seconds)
        what = f'latency, batch {size}'
        rows.append((what, 's', old.seconds, new.seconds))
        spread[what] = (old.low, old.high), (new.low, new.high)
        comparisons.append((size, faster(new, old), faster(old, new)))
    if accuracies: rows.append(('accuracy', '%', *accuracies))
    return Payoff(tuple(rows), spread, tuple(_notes(comparisons, *counts)))


class _Counts(NamedTuple):
    "Hold the counts of one network, multiply-adds for a batch of one."
    parameters: int
    nonzero: int  # parameters that are not zero
    multiply_adds: int
    effective: int  # multiply-adds with a weight that is not zero


def _counts(model, inputs):
    stored = _stored_weights(model)
    parameters = sum(p.numel() for p in stored)
    nonzero = sum(int(torch.count_nonzero(p.detach())) for p in stored)
    return _Counts(parameters, nonzero, *_multiply_adds(model, _batch(inputs, 1)))


def _stored_weights(model):
    "Return the weights that a model stores: its parameters, and the values of sparse layers."
    layers = [m for m in model.modules() if isinstance(m, SPARSE)]
    kept = [b for layer in layers for b in (layer.values, layer.bias) if b is not None]
    return [_dense(p) for p in (*model.parameters(), *kept)]


def _dense(tensor):
    return tensor.to_dense() if isinstance(tensor, torch.sparse.SparseSemiStructuredTensor) else tensor


def _batch(inputs, size):
    "Make a batch of `size` items from those of the example, repeated as often as needed."
    def repeated(value):
        if not isinstance(value, torch.Tensor) or not value.ndim: return value
        return value[torch.arange(size, device=value.device) % len(value)]
    return tree_map(repeated, inputs)


def _multiply_adds(model, inputs):
    "Count a model's multiply-adds: all, and those with a weight that is not zero."
    counter = FlopCounterMode(display=False)
    with counter, _kernel_calls(model) as calls: outputs(model, inputs)
    modules, root = dict(model.named_modules()), type(model).__name__
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    unstored = with_zeros = 0.
    for name, count in counts.items():
        module = modules.get(name.removeprefix(root).lstrip('.'))
        if isinstance(module, SparseLinear): unstored += count * module.unstored  # was counted as if dense
        elif _is_dense_layer(module): with_zeros += count * _share_of_zeros(module.weight)
    total = counts.get('Global', 0) - unstored + sum(calls)
    return round(total), round(total - with_zeros)


@contextmanager
def _kernel_calls(model):
    "Note the multiply-adds of layers that call kernels, which torch does not count."
    calls = []

    def note(layer, args, output):
        places = output.numel() // max(1, layer.size[0])
        calls.append(layer.values.numel() * places)

    layers = [m for m in model.modules() if isinstance(m, (SparseConv, SparseLinearKernel))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try: yield calls
    finally:
        for hook in hooks: hook.remove()


def _is_dense_layer(module):
    "Tell whether a layer has a dense weight, each number of which takes part in equally many multiply-adds."
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)): return False
    weight = getattr(module, 'weight', None)
    return isinstance(weight, torch.Tensor) and weight.layout == torch.strided


def _share_of_zeros(weight):
    "Return the share of zeros in a weight, 0 to 1."
    return 1 - int(torch.count_nonzero(weight.detach())) / max(weight.numel(), 1)


def _file_sizes(model):
    "Measure the bytes of a model's file: as torch writes it, zipped, and packed by `save_sparse`."
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder) / 'plain', Path(folder) / 'packed'
        torch.save(model.state_dict(), plain)
        save_sparse(model, packed)
        return plain.stat().st_size, _zipped(plain), packed.stat().st_size


def _zipped(path):
    "Count the bytes of a file after zlib, piece by piece, so that it need not fit in memory."
    compressor, size = zlib.compressobj(), 0
    with open(path, 'rb') as file:
        while piece := file.read(1 << 20): size += len(compressor.compress(piece))
    return size + len(compressor.flush())


def _latencies(models, inputs, seconds):
    device = next((i.device for i in tree_leaves(inputs) if isinstance(i, torch.Tensor)), 'cpu')
    calls = [partial(inputs.call, model) for model in models]
    with evaluation_mode(*models), torch.no_grad(): return side_by_side(calls, seconds, device=device)


def _accuracy(model, dls):
    correct = total = 0
    for batch in dls:
        *x, y = _checked_batch(batch)
        guesses = _guesses(outputs(model, Inputs(tuple(x)), 'dls'))
        _check_labels(y, guesses.shape)
        correct += int((guesses == y).sum())
        total += y.numel()
    if not total: raise ValueError('dls: got no batches, expected at least one of (x, y)')
    return 100 * correct / total


def _read_batch_sizes(sizes):
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise TypeError(f'batches: got {sizes!r}, expected batch sizes, as (1, 64)')
    return [whole('batches', size) for size in sizes]


def _read_dls(dls):
    "Return batches that can be read twice; None for None."
    if dls is None or hasattr(dls, 'valid'): return getattr(dls, 'valid', None)
    if isinstance(dls, Iterable): return list(dls)
    raise TypeError(f'dls: got {dls!r}, expected fastai DataLoaders, or batches of (x, y)')


def _checked_batch(batch):
    if isinstance(batch, (tuple, list)) and len(batch) > 1: return batch
    raise TypeError(f'dls: got a {type(batch).__name__} in it, expected batches of (x, y)')


def _guesses(found):
    "Return the class that a model gives each item the highest output for."
    if found and found[0].ndim > 1: return found[0].argmax(1)
    came = f'outputs of shape {tuple(found[0].shape)}' if found else 'no tensor'
    raise ValueError(f'dls: the model gives {came}, expected (items, classes) for an accuracy')


def _check_labels(labels, shape):
    if isinstance(labels, torch.Tensor) and labels.shape == shape: return
    came = repr(labels)
    if isinstance(labels, torch.Tensor): came = f'of shape {tuple(labels.shape)}'
    raise ValueError(f'dls: got labels {came}, expected a tensor of shape {tuple(shape)}')


def _notes(comparisons, dense, sparse):
    for size, is_faster, is_slower in comparisons:
        if is_slower: yield f'batch {size}: the sparse network is slower here.'
        elif not is_faster: yield f'batch {size}: the difference in time is within the noise.'
    has_zeros = sparse.nonzero < sparse.parameters
    if has_zeros and not any(is_faster for _, is_faster, _ in comparisons): yield NO_SPEED
    if sparse.nonzero == sparse.parameters and dense.multiply_adds == sparse.multiply_adds: yield NO_ZEROS


def _formatted(value, unit):
    if unit == 's' and value < 1: return f'{1e3 * value:.3f} ms'
    if unit == 's': return f'{value:.3f} s'
    if unit == '%': return f'{value:.2f} %'
    if unit == 'B': return f'{value / 1e6:,.3f} MB'
    return f'{value:,}'


def _with_range(median, low, high, unit):
    return f'{median} ({_formatted(low, unit)} – {_formatted(high, unit)})'
