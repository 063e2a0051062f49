"Draw weights, and metrics against sparsity."
from collections.abc import Mapping
from itertools import cycle

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator
from torch.nn.parameter import is_lazy

from fasterai.arguments import whole

DEAD, CROSS = '#D0D3D8', '#60656B'
# the colour-blind can tell these apart (Okabe & Ito 2008)
COLOURS = '#0072B2', '#D55E00', '#009E73', '#E69F00', '#CC79A7', '#56B4E9'
MARKERS = 'o', 's', 'D', '^', 'v', 'P'  # by matplotlib's names
GAP = .6  # between kernels, in cells


def plot_kernels(
    weight: torch.Tensor,  # (filters, input channels), and none, one or two kernel axes
    keep: torch.Tensor | None = None,  # bool mask of the weight's shape, False is crossed out; None crosses out zeros
    ax=None,  # matplotlib axes to draw on; new ones if None
    filters: int = 6,  # how many filters are drawn, the first ones
    channels: int = 6,  # how many input channels of each are drawn, the first ones
    **mesh,  # arguments of matplotlib's `pcolormesh`, for the colours of the weights
):
    """Draw a layer's kernels and return the axes: a row for each filter, a column for each input channel.

    Weights that are pruned are crossed out."""
    weight = _read_tensor('weight', weight)
    whole('filters', filters)
    whole('channels', channels)
    if not 2 <= weight.ndim <= 4:
        raise ValueError(f'weight: got shape {tuple(weight.shape)}, expected (filters, input channels) '
                         'and at most two kernel axes')
    keep = weight != 0 if keep is None else _read_tensor('keep', keep)
    if keep.shape != weight.shape:
        raise ValueError(f'keep: got shape {tuple(keep.shape)}, '
                         f'expected that of the weight, {tuple(weight.shape)}')
    if ax is None: ax = _new_axes(5, 5, layout=None)
    weight = _kernels(weight)[:filters, :channels]
    keep = _kernels(keep)[:filters, :channels]
    kernel_rows, kernel_columns, height, width = weight.shape
    rows, heights = _places(kernel_rows, height)
    columns, widths = _places(kernel_columns, width)
    limit = float(weight.abs().max()) or 1.
    ax.pcolormesh(columns, rows, _sheet(weight), **{'cmap': 'PuOr', 'vmin': -limit, 'vmax': limit} | mesh)
    _cross_out(ax, columns, rows, _sheet(keep) == 0)
    ax.set(aspect='equal', xlabel='input channel', ylabel='filter')
    ax.set_xticks(widths, range(len(widths)))
    ax.set_yticks(heights, range(len(heights)))
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def plot_weights(
    before: torch.Tensor,  # a weight, any shape
    after: torch.Tensor,  # the weight after pruning, of the same shape
    ax=None,  # matplotlib axes to draw on; new ones if None
    bins: int = 60,  # bars of each histogram
):
    """Draw the histograms of a weight before and after pruning, and return the axes.

    The zeros are not drawn, as there are too many of them; the legend has their number."""
    before, after = _read_tensor('before', before), _read_tensor('after', after)
    if after.shape != before.shape:
        raise ValueError(f'after: got shape {tuple(after.shape)}, '
                         f'expected that of before, {tuple(before.shape)}')
    whole('bins', bins)
    before, after = _numbers('before', before), _numbers('after', after)
    if ax is None: ax = _new_axes(6, 3.2)
    limit = float(max(before.abs().max(), after.abs().max())) or 1.
    edges = torch.linspace(-limit, limit, bins + 1).numpy()
    left = after[after != 0]
    zeros = len(after) - len(left)
    ax.hist(before.numpy(), edges, color='#56B4E9', alpha=.6, label=f'before: {len(before):,} weights')
    ax.hist(left.numpy(), edges, histtype='step', color='#D55E00', lw=2,
            label=f'after: {len(left):,} left, {zeros:,} are zero')
    highest = 1.35 * ax.get_ylim()[1]  # room for the legend
    ax.set(xlabel='value of a weight', ylabel='weights', ylim=(0, highest))
    ax.legend(fontsize='small')
    return ax


def plot_tradeoff(
    curves: dict,  # {name: list of (sparsity in percent, metric)}
    ax=None,  # matplotlib axes to draw on; new ones if None
    metric: str = 'accuracy',  # the metric's name, for the axis
):
    "Draw a metric against sparsity, a curve for each name, and return the axes."
    curves = _read_curves(curves)
    if ax is None: ax = _new_axes(6, 3.6)
    for (name, points), colour, marker in zip(curves.items(), cycle(COLOURS), cycle(MARKERS)):
        ax.plot(*zip(*points), color=colour, marker=marker, label=name)
    ax.set(xlabel='weights that are zero (%)', ylabel=metric)
    ax.grid(alpha=.3)
    ax.legend()
    return ax


def plot_history(
    history: list,  # of {'epoch': its number, name of a layer: its sparsity in percent}, for each epoch
    ax=None,  # matplotlib axes to draw on; new ones if None
):
    "Draw the sparsity of each layer by epoch, and return the axes."
    if ax is None: ax = _new_axes(7, 4)
    epochs = [row['epoch'] for row in history]
    layers = [name for name in dict.fromkeys(name for row in history for name in row) if name != 'epoch']
    colours = colormaps['viridis'](np.linspace(0, .95, len(layers)))  # from the first layer to the last
    for layer, colour in zip(layers, colours):
        values = [row.get(layer, np.nan) for row in history]
        ax.plot(epochs, values, marker='.', color=colour, label=layer or '(the model)')
    ax.set(xlabel='epoch', ylabel='sparsity (%)', ylim=(-5, 105))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize='x-small', loc='center left', bbox_to_anchor=(1, .5), ncols=1 + len(layers) // 24)
    return ax


def _new_axes(width, height, layout='constrained'):
    import matplotlib.pyplot as plt  # only where a picture is drawn: it is slow to import
    _, ax = plt.subplots(figsize=(width, height), layout=layout)
    return ax


def _read_tensor(argument, value):
    "Return a tensor with values, without gradients, that can be drawn; `TypeError` or `ValueError` else."
    is_array = isinstance(value, np.ndarray) and value.dtype.kind in 'biuf'
    if is_array: value = torch.from_numpy(value.copy())
    drawable = isinstance(value, torch.Tensor) and not (is_lazy(value) or value.is_complex() or value.is_meta)
    if not drawable:
        raise TypeError(f'{argument}: got {_short(value)}, expected a tensor of real numbers')
    if not value.numel():
        raise ValueError(f'{argument}: got an empty tensor of shape {tuple(value.shape)}, expected numbers')
    value = value.detach()
    return value if value.layout == torch.strided else value.to_dense()


def _short(value): return ' '.join(repr(value).split())[:60]  # in one line, for an error


def _read_curves(curves):
    "Return {name: its points in order, (sparsity, metric)}; `TypeError` where it is something else."
    expected = 'expected {name: list of (sparsity in percent, metric)}'
    if not isinstance(curves, Mapping) or not curves:
        raise TypeError(f'curves: got {_short(curves)}, {expected}')
    found = {}
    for name, points in curves.items():
        try: found[name] = sorted((float(sparsity), float(metric)) for sparsity, metric in points)
        except (TypeError, ValueError): found[name] = []
        if not found[name]: raise TypeError(f'curves[{name!r}]: got {_short(points)}, {expected}')
    return found


def _numbers(argument, tensor):
    "Return the numbers of a tensor as one row, in float32, on the CPU; `ValueError` where one is not finite."
    numbers = tensor.float().cpu().flatten()
    if numbers.isfinite().all(): return numbers
    raise ValueError(f'{argument}: got NaN or infinite numbers, expected finite ones')


def _kernels(tensor):
    "Return a weight with two kernel axes, in float32, on the CPU."
    filters, channels, *kernel = tensor.shape
    missing = (1,) * (2 - len(kernel))
    return tensor.detach().float().cpu().reshape(filters, channels, *missing, *kernel)


def _places(
    count: int,  # kernels along an axis of the picture
    size: int,  # cells of each kernel
) -> tuple:  # edges of the cells (count * (size+1),); middles of the kernels (count,)
    "Compute the positions of cells and kernels along one axis."
    starts = torch.arange(count) * (size + GAP)
    edges = starts[:, None] + torch.arange(size + 1)
    middles = starts + size / 2
    return edges.flatten(), middles.tolist()


def _sheet(
    kernels: torch.Tensor,  # (filters, channels, kh, kw)
) -> torch.Tensor:  # (filters * (kh+1) - 1, channels * (kw+1) - 1), NaN in the gaps
    "Lay out kernels side by side, with gaps."
    filters, channels, kh, kw = kernels.shape
    sheet = torch.full((filters, kh + 1, channels, kw + 1), torch.nan)
    sheet[:, :kh, :, :kw] = kernels.transpose(1, 2)
    return sheet.view(filters * (kh + 1), channels * (kw + 1))[:-1, :-1]


def _cross_out(ax, columns, rows, dead):
    "Draw dead cells grey, with a cross."
    ax.pcolormesh(columns, rows, torch.where(dead, 0., torch.nan), cmap=ListedColormap([DEAD]))
    crosses = []
    for y, x in dead.nonzero().tolist():
        left, right = columns[x], columns[x + 1]
        top, bottom = rows[y], rows[y + 1]
        crosses += [((left, top), (right, bottom)), ((left, bottom), (right, top))]
    ax.add_collection(LineCollection(crosses, colors=CROSS, linewidths=.5))
