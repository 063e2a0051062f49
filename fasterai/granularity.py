"What lives and dies together: sets of named axes of a layer's weight."
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.arguments import nearest, one_of

_CONV = {d: f'(G O) I {k}' for d, k in ((1, 'k'), (2, 'kh kw'), (3, 'kd kh kw'))}
_TRANSPOSED = {d: f'(G I) O {k}' for d, k in ((1, 'k'), (2, 'kh kw'), (3, 'kd kh kw'))}

# A layer type's weights: the name of the parameter, which may be a glob, and its axes. O output, I input, k… kernel.
# (G O) is one axis of the tensor that holds two: G the groups of a grouped convolution; S what is stacked, four gates or q, k and v.
AXES = {
    nn.Linear: {'weight': 'O I'},
    nn.Conv1d: {'weight': _CONV[1]}, nn.Conv2d: {'weight': _CONV[2]}, nn.Conv3d: {'weight': _CONV[3]},
    nn.ConvTranspose1d: {'weight': _TRANSPOSED[1]}, nn.ConvTranspose2d: {'weight': _TRANSPOSED[2]}, nn.ConvTranspose3d: {'weight': _TRANSPOSED[3]},
    nn.Bilinear: {'weight': 'O I J'},
    nn.Embedding: {'weight': 'I O'}, nn.EmbeddingBag: {'weight': 'I O'},  # the input is one of I, as a one-hot vector
    nn.MultiheadAttention: {'in_proj_weight': '(S:3 O) I', '[qkv]_proj_weight': 'O I'},
    nn.RNN: {'weight_[ih]h_l*': 'O I'}, nn.RNNCell: {'weight_[ih]h': 'O I'},
    nn.LSTM: {'weight_[ih]h_l*': '(S:4 O) I', 'weight_hr_l*': 'O I'}, nn.LSTMCell: {'weight_[ih]h': '(S:4 O) I'},
    nn.GRU: {'weight_[ih]h_l*': '(S:3 O) I'}, nn.GRUCell: {'weight_[ih]h': '(S:3 O) I'},
}
LARGE = 64  # entries that lie together, from which on a mask repeats a decision instead of writing it out
OUTPUTS, INPUTS = frozenset('GSO'), frozenset('GI')  # axes that tell outputs apart, and inputs


def add_layer_type(
    kind: type,  # a subclass of `nn.Module`
    **weights: str,  # the axes of each of its weights, by the parameter's name: weight='O I'; (G O) where one axis holds two
):
    "Make a layer type known: a row in `AXES`. `add_layer_type(MyLinear, weight='O I')`."
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)): raise TypeError(f'kind: got {kind!r}, allowed is a subclass of nn.Module')
    if not weights: raise ValueError(f"weights: got none for {kind.__name__}, allowed is at least one, as weight='O I'")
    for name, row in weights.items():
        axes = isinstance(row, str) and [a for folded in read_axes(row) for a, _ in folded]
        if not axes or len(set(axes)) < len(axes) or re.sub(r'\((\w+)(:\d+)? \w+\)|\w+', '', row).strip():
            raise ValueError(f"{name}: got {row!r}, allowed are different names of axes, as 'O I', '(G O) I kh kw', or '(S:3 O) I' for three in one")
    AXES[kind] = weights


def weights_of(
    module: nn.Module,
) -> dict:  # name of a parameter: its axes; nothing for a type that has no row
    "What of a module are weights, by the row of `AXES` for its type or the nearest base class."
    row = next((AXES[c] for c in type(module).__mro__ if c in AXES), {})
    have = (*module._parameters, *getattr(module, 'parametrizations', ()), *(n for n in row if getattr(module, n, None) is not None))
    have = [base if base != n and hasattr(module, base) else n for n in have for base in [re.sub('_(g|v|orig)$', '', n)]]  # weight_norm
    have = [n for n in dict.fromkeys(have) if getattr(module, n, None) is not None]
    return {n: axes for n in have for pattern, axes in row.items() if fnmatchcase(n, pattern)}


def _kernel(axes): return tuple(a for a in axes if a.startswith('k'))
def _row(axes): return _kernel(axes)[-1:]
def _but(axes, names): return tuple(a for a in axes if a not in names)


@dataclass(frozen=True)
class GranularityInfo:
    "A granularity, and what others must know of it."
    spans: Callable  # {axis: size} -> the axes that one group spans, or (axis, how much of it)
    any_weight: bool = False  # does it suit a weight without an output axis?
    one_filter: bool = False  # is a group one filter, so that those of several layers can be pruned as one?
    one_layer: bool = False  # is a group a layer?


GRANULARITIES = {
    'weight': GranularityInfo(lambda axes: (), any_weight=True),
    'vector': GranularityInfo(_row),
    'kernel': GranularityInfo(_kernel),
    'filter': GranularityInfo(lambda axes: _but(axes, OUTPUTS), one_filter=True),
    'channel': GranularityInfo(lambda axes: _but(axes, INPUTS)),
    'layer': GranularityInfo(lambda axes: tuple(axes), any_weight=True, one_layer=True),
    'row': GranularityInfo(_row),
    'column': GranularityInfo(lambda axes: _kernel(axes)[-2:-1]),
    'horizontal_slice': GranularityInfo(lambda axes: ('I', *_kernel(axes)[-1:])),
    'vertical_slice': GranularityInfo(lambda axes: ('I', *_kernel(axes)[-2:-1])),
}


def read_granularity(
    granularity: str | tuple | Callable,  # a name in `GRANULARITIES`, axes, or a function of {axis: size}
) -> GranularityInfo:
    "The granularity that is meant."
    if isinstance(granularity, (tuple, list)): return GranularityInfo(lambda axes: granularity, any_weight=True)
    found = one_of('granularity', granularity, GRANULARITIES, 'a tuple of axes, block(…), or head(…)')
    if isinstance(found, GranularityInfo): return found
    return GranularityInfo(found, any_weight=True)


def _check_whole(what, n):
    if isinstance(n, bool) or not isinstance(n, int) or n < 1: raise ValueError(f'{what}: got {n!r}, allowed is a whole number from 1 on')


@dataclass(frozen=True)
class block:
    "Blocks of the O × I matrix, at each place of a kernel; where they do not fill it, those at the end are smaller."
    rows: int  # outputs a block
    columns: int  # inputs a block

    def __post_init__(self):
        _check_whole('rows of a block', self.rows)
        _check_whole('columns of a block', self.columns)

    def __call__(self, axes): return ('O', self.rows), ('I', self.columns)
    def __repr__(self): return f'block({self.rows}, {self.columns})'


@dataclass(frozen=True)
class head:
    "The heads of an attention's projections: a head's share of the outputs; with `axis='I'` of the inputs, for what follows the attention."
    n: int  # heads
    axis: str = 'O'  # which axis they share, O or I

    def __post_init__(self):
        _check_whole('heads', self.n)
        if self.axis not in ('O', 'I'): raise ValueError(f"head: got {self.axis!r} as axis, allowed is 'O' or 'I'")

    def __call__(self, axes):
        size = axes.get(self.axis, self.n)
        if size % self.n: raise ValueError(f'{self.n} heads cannot share {self.axis} = {size}')
        return *_but(axes, {self.axis}), (self.axis, size // self.n)

    def __repr__(self): return f'head({self.n})' if self.axis == 'O' else f'head({self.n}, {self.axis!r})'


class Grouping:
    "How one weight of a layer falls into groups."

    def __init__(self,
        module: nn.Module,
        granularity: str | tuple | Callable = 'weight',  # a name in `GRANULARITIES`, the axes that a group spans as ('I', 'kh'), or a block or head
        name: str = '',  # the weight's name, for errors
        attr: str = 'weight',  # the parameter's name in the module
    ):
        self.shape = tuple(getattr(module, attr).shape)
        self.axes = _axes(module, attr, self.shape)
        spanned = _spanned(granularity, self.axes, f'{type(module).__name__} {name!r}')
        pieces = {a: spanned.get(a, 1) for a in self.axes}  # how much of each axis a group spans
        self.view = [(-(-size // pieces[a]), pieces[a]) for a, size in self.axes.items()]  # groups along it, and entries of one
        short = [n * p - size for (n, p), size in zip(self.view, self.axes.values())]
        self.pad = [x for s in reversed(short) for x in (0, s)] if any(short) else None
        self.groups, self.size = prod(n for n, _ in self.view), prod(p for _, p in self.view)  # how many, and weights a group
        # the view's axes that matter: first what tells groups apart, then what they span
        flat = [n for pair in self.view for n in pair]
        self.dims = [n for n in flat if n != 1]
        inner = [i % 2 for i, n in enumerate(flat) if n != 1]
        self.order = sorted(range(len(inner)), key=inner.__getitem__)
        self.in_order = not self.pad and self.order == sorted(self.order)  # do the groups lie one behind the other?
        self.sizes = self.count(torch.ones(self.shape, dtype=torch.bool)) if self.pad else self.size  # one number, or (groups,)
        self.one_layer = read_granularity(granularity).one_layer
        # a group is one filter, or several
        self.whole_filters = 'O' in self.axes and all(spanned.get(a) == n for a, n in self.axes.items() if a not in OUTPUTS)

    def rows(self,
        tensor: torch.Tensor,  # of the weight's shape
    ) -> torch.Tensor:  # (groups, size), or (groups,) where a group is one weight; a view where the layout allows; short groups end in zeros
        "One row for each group, in the order of their position."
        if self.size == 1: return tensor.reshape(-1)
        if self.in_order: return tensor.reshape(self.groups, self.size)
        if self.pad: tensor = F.pad(tensor.reshape(tuple(self.axes.values())), self.pad)
        return tensor.reshape(self.dims).permute(self.order).reshape(self.groups, self.size)

    def mean(self,
        scores: torch.Tensor | np.ndarray,  # rows
        where: slice | torch.Tensor = slice(None),  # of the groups, or their positions: which rows they are
    ) -> torch.Tensor | np.ndarray:  # (rows,), as they came
        "The score of a group: the mean of its entries' scores, so that groups of different size compare."
        if self.size == 1: return scores
        if self.pad:
            scores = torch.as_tensor(scores)
            return scores.sum(1) / self.sizes.to(scores.device)[where]
        if isinstance(scores, torch.Tensor): return scores.mean(1)
        if self.size > 8: return torch.from_numpy(scores).mean(1).numpy()
        columns = scores.T  # few summands: a column at a time is several times faster
        total = columns[0] + columns[1]
        for column in columns[2:]: total += column
        return total / np.float32(self.size)

    def count(self,
        mask: torch.Tensor,  # bool, of the weight's shape
    ) -> torch.Tensor:  # (groups,), int64
        "How many entries of each group are True."
        return self.rows(mask).view(self.groups, -1).sum(1, dtype=torch.int32).long()

    def expand(self,
        keep: torch.Tensor,  # (groups,), bool
    ) -> torch.Tensor:  # bool, of the weight's shape; a view that repeats the decision, where the layout allows
        "A decision for each group, for each weight."
        if self.size == 1: return keep.reshape(self.shape)
        wide = keep[:, None].expand(-1, self.size)
        if self.size < LARGE and keep.device.type == 'cpu': wide = torch.from_numpy(np.repeat(keep.numpy(), self.size))
        if not self.in_order:
            wide = wide.reshape([self.dims[i] for i in self.order]).permute([self.order.index(i) for i in range(len(self.order))])
        if self.pad:
            wide = wide.reshape([n * p for n, p in self.view])[tuple(slice(size) for size in self.axes.values())]
        wide = wide.reshape(self.shape)
        repeated = prod(n for n, step in zip(wide.shape, wide.stride()) if step == 0)
        return wide if repeated >= LARGE and wide.stride(-1) == 0 else wide.contiguous()


def read_axes(
    row: str,  # as '(S:4 O) I'
) -> list:  # of lists of (axis, how many or 0), one for each axis of the tensor
    "The axes of a weight, as a row of `AXES` says them."
    return [[(a, int(n or 0)) for a, n in re.findall(r'(\w+)(?::(\d+))?', folded)] for folded in re.findall(r'\([^)]*\)|\w+', row)]


def _axes(module, attr, shape):
    "The axes of a weight and their sizes; those of a parameter that no row names are d0, d1, …"
    row = weights_of(module).get(attr)
    if row is None: return {f'd{i}': n for i, n in enumerate(shape)}
    read = read_axes(row)
    if len(read) != len(shape): raise ValueError(f'{attr}: {type(module).__name__} has one of shape {shape}, but its row says {row!r}')
    axes = {}
    for folded, n in zip(read, shape):
        for axis, size in folded[:-1]: axes[axis] = size or getattr(module, 'groups', 1)
        axes[folded[-1][0]], rest = divmod(n, prod(axes[a] for a, _ in folded[:-1]))
        if rest: raise ValueError(f'{attr}: {type(module).__name__} has one of shape {shape}, which does not fit its row {row!r}')
    return axes


def _spanned(granularity, axes, whose):
    "Which axes a group spans, and how much of each; `ValueError` if the layer cannot have that."
    names = [name for name, row in GRANULARITIES.items() if 'O' in axes or row.any_weight]
    blocks = ', block(rows, columns), head(n)' if 'O' in axes else ''
    allowed = f'allowed for {whose} is one of {", ".join(names)}{blocks}, or a tuple of its axes {", ".join(axes)}'
    found = read_granularity(granularity)
    if not (found.any_weight or 'O' in axes): raise ValueError(f'granularity: got {granularity!r}, {allowed}')
    try: spanned = found.spans(axes)
    except ValueError as error: raise ValueError(f'granularity: got {granularity!r}, and {error}; {allowed}') from None
    pieces = {}
    for entry in spanned:
        axis, piece = entry if isinstance(entry, tuple) else (entry, None)
        if axis not in axes:
            got = f'axis {axis!r}' if granularity is spanned else repr(granularity)
            raise ValueError(f'granularity: got {got}, {allowed}{nearest(axis, axes)}')
        pieces[axis] = axes[axis] if piece is None else min(piece, axes[axis])
    return pieces
