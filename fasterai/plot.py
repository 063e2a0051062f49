"Pictures of weights, and of what they are worth."
from itertools import cycle

import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap

DEAD, CROSS = '#D0D3D8', '#60656B'
COLOURS = '#0072B2', '#D55E00', '#009E73', '#E69F00', '#CC79A7', '#56B4E9'  # told apart by the colour-blind (Okabe & Ito 2008)
GAP = .6  # between kernels, in cells


def plot_kernels(
    weight: torch.Tensor,  # (filters, input channels), then none, one or two kernel axes
    keep: torch.Tensor | None = None,  # bool, of the weight's shape, False = crossed out; None crosses out what is zero
    ax=None,  # matplotlib axes to draw on; new ones if None
    filters: int = 6,  # draw so many, the first
    channels: int = 6,  # and of each so many, the first
    **mesh,  # how the weights are coloured, as in matplotlib's `pcolormesh`
):
    "Draw a layer's kernels, a row for each filter, a column for each input channel, dead weights crossed out; returns the axes."
    if not 2 <= weight.ndim <= 4:
        raise ValueError(f'weight: got shape {tuple(weight.shape)}, allowed is (filters, input channels) and at most two kernel axes')
    if keep is None: keep = weight != 0
    if keep.shape != weight.shape: raise ValueError(f'keep: got shape {tuple(keep.shape)}, allowed is that of the weight, {tuple(weight.shape)}')
    if ax is None:
        import matplotlib.pyplot as plt
        _, ax = plt.subplots(figsize=(5, 5))
    weight, keep = (_kernels(t)[:filters, :channels] for t in (weight, keep))
    (rows, heights), (columns, widths) = (_places(n, k) for n, k in zip(weight.shape[:2], weight.shape[2:]))
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
    after: torch.Tensor,  # the same, sparse
    ax=None,  # matplotlib axes to draw on; new ones if None
    bins: int = 60,
):
    "Draw the histograms of a weight before and after; the zeros, which would tower over all, are told in numbers. Returns the axes."
    if ax is None:
        import matplotlib.pyplot as plt
        _, ax = plt.subplots(figsize=(6, 3.2), layout='constrained')
    before, after = (t.detach().float().cpu().flatten() for t in (before, after))
    limit = float(max(before.abs().max(), after.abs().max())) or 1.
    edges = torch.linspace(-limit, limit, bins + 1).numpy()
    ax.hist(before.numpy(), edges, color='#56B4E9', alpha=.6, label=f'before: {len(before):,} weights')
    zeros = int((after == 0).sum())
    ax.hist(after[after != 0].numpy(), edges, histtype='step', color='#D55E00', lw=2, label=f'after: {len(after) - zeros:,} left, {zeros:,} are zero')
    ax.set(xlabel='value of a weight', ylabel='weights', ylim=(0, 1.35 * ax.get_ylim()[1]))  # room for the legend
    ax.legend(fontsize='small')
    return ax


def plot_tradeoff(
    curves: dict,  # name: list of (sparsity in percent, metric)
    ax=None,  # matplotlib axes to draw on; new ones if None
    metric: str = 'accuracy',  # how the metric is called
):
    "Draw a metric against sparsity, a curve for each criterion, granularity or schedule; returns the axes."
    if ax is None:
        import matplotlib.pyplot as plt
        _, ax = plt.subplots(figsize=(6, 3.6), layout='constrained')
    for (name, points), colour, marker in zip(curves.items(), cycle(COLOURS), cycle('osD^vP')):
        ax.plot(*zip(*sorted(points)), color=colour, marker=marker, label=name)
    ax.set(xlabel='weights that are zero (%)', ylabel=metric)
    ax.grid(alpha=.3)
    ax.legend()
    return ax


def _kernels(tensor):
    "With two kernel axes, float32, on the CPU."
    return tensor.detach().float().cpu().reshape(*tensor.shape[:2], *(1,) * (4 - tensor.ndim), *tensor.shape[2:])


def _places(
    count: int,  # kernels along an axis of the picture
    size: int,  # cells of each
) -> tuple:  # edges of the cells (count * (size+1),); middles of the kernels (count,)
    "Where the cells lie along one axis."
    starts = torch.arange(count) * (size + GAP)
    return (starts[:, None] + torch.arange(size + 1)).flatten(), (starts + size / 2).tolist()


def _sheet(
    kernels: torch.Tensor,  # (filters, channels, kh, kw)
) -> torch.Tensor:  # (filters * (kh+1) - 1, channels * (kw+1) - 1), NaN in the gaps
    "Kernels laid out side by side."
    filters, channels, kh, kw = kernels.shape
    sheet = torch.full((filters, kh + 1, channels, kw + 1), torch.nan)
    sheet[:, :kh, :, :kw] = kernels.transpose(1, 2)
    return sheet.view(filters * (kh + 1), channels * (kw + 1))[:-1, :-1]


def _cross_out(ax, columns, rows, dead):
    "Grey cells with a cross."
    ax.pcolormesh(columns, rows, torch.where(dead, 0., torch.nan), cmap=ListedColormap([DEAD]))
    crosses = []
    for y, x in dead.nonzero().tolist():
        left, right, top, bottom = columns[x], columns[x + 1], rows[y], rows[y + 1]
        crosses += [((left, top), (right, bottom)), ((left, bottom), (right, top))]
    ax.add_collection(LineCollection(crosses, colors=CROSS, linewidths=.5))
