"What the zeros have brought: parameters, multiply-adds, bytes, time, accuracy, measured."
import tempfile
import zlib
from copy import deepcopy
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fasterai.deploy.compare import example_inputs, outputs
from fasterai.deploy.files import save_sparse
from fasterai.deploy.speed_up import SparseLinear
from fasterai.deploy.timing import faster, side_by_side
from fasterai.tables import as_html, as_text


@dataclass(frozen=True)
class Payoff:
    "Rows (what, unit, dense, sparse), and what is to be said; prints as a table, shows as HTML in a notebook."
    rows: tuple  # of (what, unit, dense, sparse)
    spread: dict  # what: (low, high) of dense and of sparse, the middle half of the times
    notes: tuple  # sentences

    def _cells(self):
        yield 'what', 'dense', 'sparse', 'sparse / dense'
        for what, unit, dense, sparse in self.rows:
            said = [_said(v, unit) for v in (dense, sparse)]
            if what in self.spread: said = [f'{v} ({_said(low, unit)} – {_said(high, unit)})' for v, (low, high) in zip(said, self.spread[what])]
            yield what, *said, f'{sparse / dense:.3f}' if dense else ''

    def __str__(self):
        return '\n'.join([as_text(self._cells()), *self.notes])

    def _repr_html_(self):
        return as_html(self._cells()) + ''.join(f'<div>{escape(n)}</div>' for n in self.notes)

    def to_frame(self):
        "A pandas DataFrame, one row for each thing that was measured."
        import pandas as pd
        return pd.DataFrame(self.rows, columns=['what', 'unit', 'dense', 'sparse']).assign(ratio=lambda f: f['sparse'] / f['dense'])

    def plot(self, ax=None):
        "Draw what is left of each, as a share of dense; returns the matplotlib axes."
        rows = [(what, sparse / dense, what in self.spread) for what, unit, dense, sparse in self.rows if dense and unit != '%']
        if ax is None:
            import matplotlib.pyplot as plt
            _, ax = plt.subplots(figsize=(6.5, 1 + .32 * len(rows)), layout='constrained')
        colours = ['#D55E00' if timed else '#0072B2' for *_, timed in rows]
        bars = ax.barh([what for what, _, _ in rows], [100 * share for _, share, _ in rows], color=colours)
        ax.bar_label(bars, [f'{100 * share:.1f} %' for _, share, _ in rows], padding=3, fontsize='small')
        ax.axvline(100, color='#606060', ls='--', lw=1)
        ax.invert_yaxis()
        ax.set(xlabel='left of the dense network (%)', xlim=(0, max(118, *(118 * share for _, share, _ in rows))))
        ax.spines[['top', 'right']].set_visible(False)
        return ax


def payoff(
    dense: nn.Module,  # the network before
    sparse: nn.Module,  # and after: with zeros in it, shrunk, or sped up
    example,  # a batch as both take it, a tuple for several inputs; its items are repeated for other batch sizes
    dls=None,  # fastai DataLoaders, or batches of (x, y), for the accuracy
    batches: tuple = (1, 64),  # batch sizes at which the latency is measured
    seconds: float = 2.,  # to time each of them, about
) -> Payoff:
    "Measure what the one needs and what the other does, the times side by side."
    for name, model in (('dense', dense), ('sparse', sparse)):
        if not isinstance(model, nn.Module): raise TypeError(f'{name}: got {type(model).__name__}, allowed is a torch.nn.Module')
    inputs, both = example_inputs(example), (deepcopy(dense), deepcopy(sparse))
    if dls is not None: dls = dls.valid if hasattr(dls, 'valid') else list(dls)
    for model in both: outputs(model, inputs)
    nonzero = [sum(int(torch.count_nonzero(p.detach())) for p in _stored(m)) for m in both]
    rows = [('parameters', '', *(sum(p.numel() for p in _stored(m)) for m in both)), ('non-zero parameters', '', *nonzero)]
    sums, effective = zip(*(_multiply_adds(m, _batch(inputs, 1)) for m in both))
    rows += [('multiply-adds', '', *sums), ('multiply-adds with a weight that is not zero', '', *effective)]
    rows += [(f'file, {kind}', 'B', *sizes) for kind, sizes in zip(('dense', 'zipped', 'packed by save_sparse'), zip(*map(_bytes, both)))]
    spread, quick = {}, []
    for size in batches:
        old, new = _latencies(both, _batch(inputs, size), seconds)
        what = f'latency, batch {size}'
        rows.append((what, 's', old.seconds, new.seconds))
        spread[what] = (old.low, old.high), (new.low, new.high)
        quick.append((size, faster(new, old), faster(old, new)))
    if dls is not None: rows.append(('accuracy', '%', *(_accuracy(m, dls) for m in both)))
    return Payoff(tuple(rows), spread, tuple(_notes(quick, nonzero, [sum(p.numel() for p in _stored(m)) for m in both], sums)))


def _stored(model):
    "Parameters, and the values of layers that are stored sparse."
    kept = [b for m in model.modules() if isinstance(m, SparseLinear) for b in (m.values, m.bias) if b is not None]
    return [p.to_dense() if isinstance(p, torch.sparse.SparseSemiStructuredTensor) else p for p in (*model.parameters(), *kept)]


def _batch(inputs, size):
    "As many items, the example's over and over."
    return tuple(i[torch.arange(size, device=i.device) % len(i)] if isinstance(i, torch.Tensor) and i.ndim else i for i in inputs)


def _multiply_adds(model, inputs):
    "Of one item: all, and those with a weight that is not zero."
    counter = FlopCounterMode(display=False)
    with counter: outputs(model, inputs)
    named, root = dict(model.named_modules()), type(model).__name__
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    total = counts.get('Global', 0)
    spared = unstored = 0.
    for name, flops in counts.items():
        module = named.get(name.removeprefix(root).lstrip('.'))
        if isinstance(module, SparseLinear): unstored += flops * (1 - module.values.numel() / (module.size[0] * module.size[1]))
        weight = getattr(module, 'weight', None)
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and isinstance(weight, torch.Tensor) and weight.layout == torch.strided:
            spared += flops * (1 - int(torch.count_nonzero(weight.detach())) / max(weight.numel(), 1))
    return round(total - unstored), round(total - unstored - spared)


def _bytes(model):
    "Of the file: as torch writes it, the same zipped, and packed."
    with tempfile.TemporaryDirectory() as folder:
        plain, packed = Path(folder) / 'plain', Path(folder) / 'packed'
        torch.save(model.state_dict(), plain)
        save_sparse(model, packed)
        squeeze, zipped = zlib.compressobj(), 0
        with open(plain, 'rb') as file:
            while piece := file.read(1 << 20): zipped += len(squeeze.compress(piece))
        return plain.stat().st_size, zipped + len(squeeze.flush()), packed.stat().st_size


def _latencies(models, inputs, seconds):
    modes = {m: m.training for model in models for m in model.modules()}
    try:
        for m in modes: m.training = False
        device = next((i.device for i in inputs if isinstance(i, torch.Tensor)), 'cpu')
        with torch.no_grad(): return side_by_side([lambda m=m: m(*inputs) for m in models], seconds, device=device)
    finally:
        for m, mode in modes.items(): m.training = mode


def _accuracy(model, dls):
    right = total = 0
    for *x, y in dls:
        out = outputs(model, tuple(x))[0]
        right, total = right + int((out.argmax(1) == y).sum()), total + y.numel()
    if not total: raise ValueError('dls: got no batches, allowed is at least one of (x, y)')
    return 100 * right / total


def _notes(quick, nonzero, stored, sums):
    for size, better, worse in quick:
        if not better and not worse: yield f'batch {size}: the difference in time is within the noise.'
        elif worse: yield f'batch {size}: the sparse network is slower here.'
    if nonzero[1] < stored[1] and not any(better for _, better, _ in quick):
        yield ('The zeros bring no speed here: a dense layer multiplies by zero as by any number. shrink() removes whole filters that are zero, '
               'speed_up() has faster forms of large Linear and 1 × 1 layers with 80 % zeros or more, and of the pattern 2:4 on a GPU.')
    if nonzero[1] == stored[1] and sums[1] == sums[0]: yield 'There are no zeros, and nothing was removed.'


def _said(value, unit):
    if unit == 's': return f'{1e3 * value:.3f} ms' if value < 1 else f'{value:.3f} s'
    if unit == '%': return f'{value:.2f} %'
    if unit == 'B': return f'{value / 1e6:,.3f} MB'
    return f'{value:,}'


