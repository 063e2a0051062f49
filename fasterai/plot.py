"Draw weights, and metrics against sparsity."
from collections.abc import Mapping
from itertools import cycle

import numpy as np
import torch
from matplotlib import colormaps, rcParams
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
WIDTH = 5  # of a picture, in inches: letters of 10 points can be read where it is as wide as a phone
LINE = 1.3  # from one line of text to the next, in heights of its letters


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
    if ax is None: ax = new_axes(5, layout=None)
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
    if ax is None: ax = new_axes()
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
    curves: dict,  # {name: list of (sparsity in percent, metric)}; several of one sparsity, as of several seeds, are averaged
    ax=None,  # matplotlib axes to draw on; new ones if None
    metric: str = 'accuracy',  # the metric's name, for the axis
):
    """Draw a metric against sparsity, a curve for each name, and return the axes.

    Where a sparsity, to 0.1 %, has several metrics, the curve is their mean, in a band from the lowest to the
    highest."""
    curves = _read_curves(curves)
    if ax is None: ax = new_axes()
    for (name, points), colour, marker in zip(curves.items(), cycle(COLOURS), cycle(MARKERS)):
        sparsities, metrics = zip(*_grouped(points))
        if len(points) > len(metrics):
            lowest, highest = [min(m) for m in metrics], [max(m) for m in metrics]
            ax.fill_between(sparsities, lowest, highest, color=colour, alpha=.15, lw=0)
        ax.plot(sparsities, [np.mean(m) for m in metrics], color=colour, marker=marker, ms=4, label=name)
    ax.set(xlabel='weights that are zero (%)', ylabel=metric)
    ax.grid(alpha=.3)
    label_ends(ax)
    return ax


def _grouped(points):
    "Return [(sparsity, its metrics)] of sorted points, those within 0.1 % of each other together."
    groups = []
    for sparsity, metric in points:
        if groups and sparsity - groups[-1][0] <= .1: groups[-1][1].append(metric)
        else: groups.append((sparsity, [metric]))
    return groups


def plot_history(
    history: list,  # of {'epoch': its number, name of a layer: its sparsity in percent}, for each epoch
    ax=None,  # matplotlib axes to draw on; new ones if None
):
    "Draw the sparsity of each layer by epoch, and return the axes."
    epochs = [row['epoch'] for row in history]
    layers = [name for name in dict.fromkeys(name for row in history for name in row) if name != 'epoch']
    if ax is None: ax = new_axes(height_of(len(layers)))
    for layer, colour in zip(layers, layer_colours(len(layers))):
        values = [row.get(layer, np.nan) for row in history]
        ax.plot(epochs, values, marker='.', color=colour, label=layer or '(the model)')
    ax.set(xlabel='epoch', ylabel='sparsity (%)', ylim=(-5, 105))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_ends(ax)
    return ax


def layer_colours(
    n: int,  # how many layers
) -> list:  # of colours
    "Return a colour for each layer, from the first to the last, all of which can be seen on white."
    return list(colormaps['viridis'](np.linspace(0, .8, n)))


def new_axes(
    height: float = 3.4,  # in inches
    layout: str | None = 'constrained',  # as in matplotlib
):
    "Return new matplotlib axes, in a figure that is as wide as all others."
    import matplotlib.pyplot as plt  # only where a picture is drawn: it is slow to import
    _, ax = plt.subplots(figsize=(WIDTH, height), layout=layout)
    return ax


def height_of(
    labels: int,  # how many stand one below the other
) -> float:  # inches
    "Return the height of a figure in which so many labels have room."
    return max(3.4, LINE * rcParams['font.size'] / 72 * labels / .75)  # the axes have three quarters of it


def label_ends(
    ax,  # matplotlib axes, whose limits are not changed afterwards
):
    "Write the label of each line to its right end, in its colour, where a legend would have to be looked up."
    ax.spines[['top', 'right']].set_visible(False)
    ax.autoscale_view()
    lines = [line for line in ax.lines if not line.get_label().startswith('_')]
    ends = {line: _end(ax, line) for line in lines}
    inches = ax.get_position().height * ax.figure.get_figheight()
    lines = sorted(lines, key=ends.get)
    heights = _apart([ends[line] for line in lines], LINE * rcParams['font.size'] / 72 / inches)
    for line, height in zip(lines, heights):
        ax.text(1.02, height, line.get_label(), color=line.get_color(), va='center', transform=ax.transAxes)


def _end(ax, line):
    "Return the height of a line's right end, as a share of the height of the axes."
    points = np.column_stack([np.asarray(values, float) for values in line.get_data()])
    points = points[np.isfinite(points).all(1)]
    if not len(points): return 0.
    rightmost = points[points[:, 0].argmax()]
    place = ax.transAxes.inverted().transform(line.get_transform().transform(rightmost))
    return float(np.clip(place[1], 0, 1))


def _apart(heights, gap):
    "Return rising heights with a gap between neighbours, none above 1, moved as little as that needs."
    found = []
    for height in heights: found.append(max(height, found[-1] + gap) if found else height)
    highest = 1.
    for i in reversed(range(len(found))):
        found[i] = min(found[i], highest)
        highest = found[i] - gap
    return found


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
