"Split the weights of a layer into groups that are pruned together: structured or unstructured pruning."
import re
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import ceil, prod

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fasterai.arguments import callable_with, is_whole, name_of, nearest, one_of, whole

_KERNELS = {1: 'k', 2: 'kh kw', 3: 'kd kh kw'}  # the axes of a kernel in so many dimensions
_CONV = {d: f'(G O) I {kernel}' for d, kernel in _KERNELS.items()}
_TRANSPOSED = {d: f'(G I) O {kernel}' for d, kernel in _KERNELS.items()}

# The weights of each layer type: {name of the parameter, which may be a glob: its axes}.
# The letters: O outputs, I inputs, J second inputs, k… kernel, G groups of a grouped convolution,
# S what is stacked along one axis: the gates of an LSTM or GRU, or queries, keys and values.
# (G O) is one axis of the tensor that holds two; (S:4 O) says that S has length 4.
AXES = {
    nn.Linear: {'weight': 'O I'},
    nn.Conv1d: {'weight': _CONV[1]},
    nn.Conv2d: {'weight': _CONV[2]},
    nn.Conv3d: {'weight': _CONV[3]},
    nn.ConvTranspose1d: {'weight': _TRANSPOSED[1]},
    nn.ConvTranspose2d: {'weight': _TRANSPOSED[2]},
    nn.ConvTranspose3d: {'weight': _TRANSPOSED[3]},
    nn.Bilinear: {'weight': 'O I J'},
    nn.Embedding: {'weight': 'I O'},  # the input is one of I, as a one-hot vector
    nn.EmbeddingBag: {'weight': 'I O'},
    nn.MultiheadAttention: {'in_proj_weight': '(S:3 O) I', '[qkv]_proj_weight': 'O I'},
    nn.RNN: {'weight_[ih]h_l*': 'O I'},
    nn.RNNCell: {'weight_[ih]h': 'O I'},
    nn.LSTM: {'weight_[ih]h_l*': '(S:4 O) I', 'weight_hr_l*': 'O I'},
    nn.LSTMCell: {'weight_[ih]h': '(S:4 O) I'},
    nn.GRU: {'weight_[ih]h_l*': '(S:3 O) I'},
    nn.GRUCell: {'weight_[ih]h': '(S:3 O) I'},
}
BY_NAME = {  # in the same way, of libraries that are not imported here
    'transformers.pytorch_utils.Conv1D': {'weight': 'I O'},
}
LARGE = 64  # neighbouring entries from which on a mask is a view that repeats a decision, not a copy
OUTPUTS = frozenset('GSO')  # axes that tell outputs apart
INPUTS = frozenset('GI')  # axes that tell inputs apart


# ---- Layer types: which parameters are weights, and what their axes mean

def add_layer_type(
    kind: type,  # a subclass of `nn.Module`
    **weights: str,  # the axes of each weight, by the parameter's name, as weight='O I'; (G O) where one axis holds two
):
    """Add a layer type, so that its weights can be pruned: `add_layer_type(MyLinear, weight='O I')`.

    The axes become a row in `AXES`, which subclasses of the type use too. `TypeError` if `kind` is no module
    class, `ValueError` if no weight is given or its axes cannot be read."""
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f'kind: got {kind!r}, expected a subclass of nn.Module')
    if not weights:
        raise ValueError(f"weights: got none for {kind.__name__}, expected at least one, as weight='O I'")
    for name, row in weights.items(): _check_axes(name, row)
    AXES[kind] = weights


def _check_axes(name, row):
    "Raise `ValueError` unless `row` names different axes, as a row of `AXES` does."
    if isinstance(row, str):
        axes = [axis for folded in read_axes(row) for axis, _ in folded]
        not_read = re.sub(r'\((\w+)(:[0-9]+)? \w+\)|\w+', '', row).strip()
        if axes and len(set(axes)) == len(axes) and not not_read: return
    raise ValueError(f"{name}: got {row!r}, expected different names of axes, as 'O I', '(G O) I kh kw', "
                     "or '(S:3 O) I' for three in one")


def read_axes(
    row: str,  # as '(S:4 O) I'
) -> list:  # of lists of (axis, its length or 0 if the row does not say), one list for each axis of the tensor
    "Read the axes of a weight from a row of `AXES`: '(S:4 O) I' gives [[('S', 4), ('O', 0)], [('I', 0)]]."
    of_tensor = re.findall(r'\([^)]*\)|\w+', row)
    return [[(axis, int(length or 0)) for axis, length in re.findall(r'(\w+)(?::([0-9]+))?', folded)]
            for folded in of_tensor]


def weights_of(
    module: nn.Module,
) -> dict:  # {name of a parameter: its axes, as a row of `AXES`}; empty for a type that has no row
    "Find the weights of a module and their axes, by the row of `AXES` for its type or nearest base class."
    rows = map(_row_of, type(module).__mro__)
    row = next((row for row in rows if row is not None), {})
    found = {}
    for name in _weight_names(module, row):
        for pattern, axes in row.items():
            if fnmatchcase(name, pattern): found[name] = axes
    return found


def _row_of(kind): return AXES.get(kind, BY_NAME.get(f'{kind.__module__}.{kind.__name__}'))


def _weight_names(module, row):
    "Return the names of the tensors of a module that may be weights, also where one is computed from others."
    names = list(module._parameters)
    names += getattr(module, 'parametrizations', ())  # computed by torch.nn.utils.parametrize
    names += [name for name in row if held(module, name) is not None]  # no parameter: any other attribute
    names = dict.fromkeys(_computed_name(module, name) for name in names)
    return [name for name in names if held(module, name) is not None]


def held(
    module: nn.Module,
    name: str,  # of an attribute
):
    """Return what a module has by that name, without computing it: for a parametrized weight the property of
    its class; None where there is nothing.

    `getattr` would run the parametrization, which for spectral_norm changes its buffers."""
    for place in (module._parameters, module._buffers, module._modules, vars(module)):
        if name in place: return place[name]
    return getattr(type(module), name, None)


def _computed_name(module, name):
    "Return 'weight' for 'weight_g', 'weight_v' and 'weight_orig', the parts of a weight that is computed."
    base = re.sub('_(g|v|orig)$', '', name)
    return base if held(module, base) is not None else name


def is_part(
    module: nn.Module,
    name: str,  # of a parameter
) -> bool:
    "Tell whether another weight of the module is computed from a parameter."
    return _computed_name(module, name) != name


def _axes(module, attr, shape):
    "Return {axis: length} of a weight; the axes of a parameter that no row names are d0, d1, …"
    row = weights_of(module).get(attr)
    if row is None: return {f'd{i}': length for i, length in enumerate(shape)}
    has = f'{attr}: {type(module).__name__} has one of shape {shape}'
    read = read_axes(row)
    if len(read) != len(shape): raise ValueError(f'{has}, but its row says {row!r}')
    axes = {}
    for folded, length in zip(read, shape):
        *outer, (last, _) = folded  # the length of the last one is what the others leave
        for axis, known in outer: axes[axis] = known or getattr(module, 'groups', 1)
        axes[last], rest = divmod(length, prod(axes[axis] for axis, _ in outer))
        if rest: raise ValueError(f'{has}, which does not fit its row {row!r}')
    return axes


# ---- Granularities: which axes one group spans

def _kernel(axes): return tuple(a for a in axes if a.startswith('k'))
def _kernel_row(axes): return _kernel(axes)[-1:]
def _kernel_column(axes): return _kernel(axes)[-2:-1]
def _but(axes, names): return tuple(a for a in axes if a not in names)


@dataclass(frozen=True)
class GranularityInfo:
    """Describe a granularity, as a row of `GRANULARITIES`.

    To add one, name the axes that a group spans, as in `AXES`; each place along the other axes is a group:
    `GRANULARITIES['inputs'] = GranularityInfo(lambda axes: ('I',))`."""
    spans: Callable  # from {axis: length} of a weight to the axes that a group spans: names, or (name, how much of it)
    any_weight: bool = False  # True if it suits a weight without an output axis, such as that of a BatchNorm
    one_filter: bool = False  # True if a group is one filter, so that filters of several layers can be pruned together
    one_layer: bool = False  # True if a group is all of a layer
    several: bool = False  # True if a group has several weights, in a layer of any type


GRANULARITIES = {
    'weight': GranularityInfo(lambda axes: (), any_weight=True),
    'vector': GranularityInfo(_kernel_row),
    'kernel': GranularityInfo(_kernel),
    'filter': GranularityInfo(lambda axes: _but(axes, OUTPUTS), one_filter=True, several=True),
    'channel': GranularityInfo(lambda axes: _but(axes, INPUTS), several=True),
    'layer': GranularityInfo(lambda axes: tuple(axes), any_weight=True, one_layer=True, several=True),
    'row': GranularityInfo(_kernel_row),  # the same groups as 'vector': both names are in use
    'column': GranularityInfo(_kernel_column),
    'horizontal_slice': GranularityInfo(lambda axes: ('I', *_kernel_row(axes)), several=True),
    'vertical_slice': GranularityInfo(lambda axes: ('I', *_kernel_column(axes)), several=True),
}


def read_granularity(
    granularity: str | tuple | Callable,  # a name in `GRANULARITIES`, axes, or a function of {axis: length}
) -> GranularityInfo:
    """Return the granularity for what the user gave.

    `ValueError` if a name is unknown, `TypeError` if it is none of these."""
    if isinstance(granularity, (tuple, list)):
        _read_entries(granularity, granularity)
        return GranularityInfo(lambda axes: granularity, any_weight=True)
    found = one_of('granularity', granularity, GRANULARITIES, 'a tuple of axes, block(…), or head(…)')
    spans = found.spans if isinstance(found, GranularityInfo) else found
    callable_with('granularity', spans, 1, 'a function of axes')
    if isinstance(found, GranularityInfo): return found
    return GranularityInfo(found, any_weight=True, several=getattr(found, 'several', False))


def _read_entries(granularity, spanned):
    """Return [(axis, how much of it a group spans, None for all of it)] of what a granularity spans.

    `ValueError` where it is something else."""
    came = repr(granularity)
    if spanned is not granularity: came = f'{name_of(granularity)}, which gives {spanned!r}'
    wrong = ValueError(f"granularity: got {came}, expected names of axes, or an axis and how much of it, "
                       "1 or more, as ('kh', ('I', 4))")
    if not isinstance(spanned, Iterable): raise wrong
    entries = [entry if isinstance(entry, tuple) else (entry, None) for entry in spanned]
    for entry in entries:
        if len(entry) != 2 or not isinstance(entry[0], str): raise wrong
        if entry[1] is not None and not is_whole(entry[1]): raise wrong
    return entries


@dataclass(frozen=True)
class block:
    """Prune blocks of the outputs × inputs matrix (block sparsity), at each place of a kernel.

    Where the blocks do not fill the matrix, those at its end are smaller. `ValueError` if a size is not an
    integer of 1 or more."""
    rows: int  # outputs a block
    columns: int  # inputs a block

    def __post_init__(self):
        whole('rows of a block', self.rows)
        whole('columns of a block', self.columns)

    @property
    def several(self) -> bool:
        "Return True if a block has several weights."
        return self.rows * self.columns > 1

    def __call__(self, axes): return ('O', self.rows), ('I', self.columns)
    def __repr__(self): return f'block({self.rows}, {self.columns})'


@dataclass(frozen=True)
class head:
    """Prune the heads of an attention layer: one group is one head's share of the outputs of a projection.

    With `axis='I'` it is a head's share of the inputs, for the projection that follows the attention.
    `ValueError` if `n` is not an integer of 1 or more, or `axis` is neither."""
    n: int  # heads
    axis: str = 'O'  # which axis the heads share: 'O' outputs or 'I' inputs
    several = True  # a group has several weights

    def __post_init__(self):
        whole('heads', self.n)
        if self.axis not in ('O', 'I'):
            raise ValueError(f"head: got {self.axis!r} as axis, expected 'O' or 'I'")

    def __call__(self, axes):
        length = axes.get(self.axis, self.n)
        if length % self.n: raise ValueError(f'{self.n} heads cannot share {self.axis} = {length}')
        return *_but(axes, {self.axis}), (self.axis, length // self.n)

    def __repr__(self):
        if self.axis == 'O': return f'head({self.n})'
        return f'head({self.n}, {self.axis!r})'


def _spanned(granularity, axes, whose):
    "Return {axis: how much of it a group spans}; `ValueError` if the weight has no such groups."
    found = read_granularity(granularity)
    expected = _expected(axes, whose)
    if not found.any_weight and 'O' not in axes:
        raise ValueError(f'granularity: got {granularity!r}, {expected}')
    try:
        spanned = found.spans(axes)
        if isinstance(spanned, Iterator): spanned = list(spanned)
    except ValueError as error:
        raise ValueError(f'granularity: got {granularity!r}, and {error}; {expected}') from None
    pieces = {}
    for axis, piece in _read_entries(granularity, spanned):
        if axis not in axes:
            got = f'axis {axis!r}' if granularity is spanned else repr(granularity)
            raise ValueError(f'granularity: got {got}, {expected}{nearest(axis, axes)}')
        pieces[axis] = axes[axis] if piece is None else min(piece, axes[axis])
    return pieces


def _expected(axes, whose):
    "Return the part of an error message that lists the granularities of one weight."
    names = [name for name, row in GRANULARITIES.items() if 'O' in axes or row.any_weight]
    calls = ', block(rows, columns), head(n)' if 'O' in axes else ''
    return f'expected for {whose} one of {", ".join(names)}{calls}, or a tuple of its axes {", ".join(axes)}'


# ---- Groups of one weight

class Grouping:
    """Split one weight of a layer into groups, and convert between values of weights and values of groups.

    Groups are numbered by their position in the weight. `groups` is how many there are, `size` the weights
    of one. `sizes` is `size` or, where some groups are smaller, a tensor (groups,). `ValueError` if the
    granularity does not suit the weight."""

    def __init__(self,
        module: nn.Module,
        granularity: str | tuple | Callable = 'weight',  # a name, the axes that a group spans, as ('I', 'kh'), `block(4, 4)`, `head(8)`
        name: str = '',  # the weight's name, for errors
        attr: str = 'weight',  # the parameter's name in the module
    ):
        self.shape = tuple(getattr(module, attr).shape)
        self.axes = _axes(module, attr, self.shape)  # {axis: length}
        spanned = _spanned(granularity, self.axes, f'{type(module).__name__} {name!r}')
        self._lay_out({axis: spanned.get(axis, 1) for axis in self.axes})
        self.sizes = self.size
        if self.pad: self.sizes = self.count(torch.ones(self.shape, dtype=torch.bool))
        self.one_layer = read_granularity(granularity).one_layer  # True if the one group is the layer
        others = _but(self.axes, OUTPUTS)
        spans_others = all(spanned.get(axis) == self.axes[axis] for axis in others)
        self.whole_filters = 'O' in self.axes and spans_others  # True if a group is one filter or several
        self.parts = []  # ints (n,), the groups that compete with each other; none where all do

    def of_part(self,
        shape: tuple,  # of a part of the weight
    ):
        "Return the grouping of a part, where a group is one weight. Its axes are those of the whole."
        if self.size > 1: raise ValueError(f'part: got groups of {self.size}, expected single weights')
        part = copy(self)
        part.shape, part.groups = tuple(shape), prod(shape)
        return part

    def _lay_out(self, pieces):
        """Find the shapes in which each group is one row; `pieces` is {axis: how much of it a group spans}.

        Every axis becomes two: the groups along it, and the entries of one group along it."""
        self.view = [(ceil(length / pieces[axis]), pieces[axis]) for axis, length in self.axes.items()]
        self.groups = prod(groups for groups, _ in self.view)
        self.size = prod(entries for _, entries in self.view)
        self.pad = self._padding()
        # axes of length 1 do not matter, and are left out
        lengths = [(n, within) for pair in self.view for within, n in enumerate(pair) if n != 1]
        self.dims = [n for n, _ in lengths]
        # first the axes that tell groups apart, then those within a group; sorting keeps the order of equals
        self.order = sorted(range(len(lengths)), key=lambda i: lengths[i][1])
        # True if the groups lie one after the other in memory
        self.in_order = not self.pad and self.order == sorted(self.order)

    def _padding(self):
        "Return how much `F.pad` must add to fill all groups, the last axis first; None where they are full."
        lengths = self.axes.values()
        missing = [groups * entries - length for (groups, entries), length in zip(self.view, lengths)]
        if not any(missing): return None
        return [n for at_end in reversed(missing) for n in (0, at_end)]

    def rows(self,
        tensor: torch.Tensor,  # of the weight's shape
    ) -> torch.Tensor:  # (groups, size), or (groups,) where a group is one weight; a view where the layout allows
        "Return one row for each group. Rows of smaller groups end in zeros."
        if self.size == 1: return tensor.reshape(-1)
        if self.in_order: return tensor.reshape(self.groups, self.size)
        if self.pad: tensor = F.pad(tensor.reshape(tuple(self.axes.values())), self.pad)
        return tensor.reshape(self.dims).permute(self.order).reshape(self.groups, self.size)

    def mean(self,
        scores: torch.Tensor | np.ndarray,  # (n, size) some rows, or (n,) where a group is one weight
        where: slice | torch.Tensor = slice(None),  # which groups the rows belong to: a slice, or positions (n,)
    ) -> torch.Tensor | np.ndarray:  # (n,), of the type of `scores`; a tensor where groups differ in size
        "Return the score of each group: the mean over its weights, so that groups of different size compare."
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

    def numbers(self,
        at: torch.Tensor,  # ints (n,), positions in the flattened weight
    ) -> torch.Tensor:  # ints (n,)
        "Return the number of the group of each weight."
        found, behind = torch.zeros_like(at), prod(self.axes.values())
        for length, (groups, entries) in zip(self.axes.values(), self.view):
            at, behind = at % behind, behind // length
            found = found * groups + at // behind // entries
        return found

    def count(self,
        mask: torch.Tensor,  # bool, of the weight's shape
    ) -> torch.Tensor:  # (groups,), int64
        "Count the True entries of each group."
        return self.rows(mask).view(self.groups, -1).sum(1, dtype=torch.int32).long()

    def expand(self,
        keep: torch.Tensor,  # (groups,), bool
    ) -> torch.Tensor:  # bool, of the weight's shape; a view that repeats the decision, where the layout allows
        "Return a decision for each weight from a decision for each group."
        if self.size == 1: return keep.reshape(self.shape)
        mask = self._repeated(keep)
        if not self.in_order: mask = self._unpermuted(mask)
        if self.pad: mask = self._cropped(mask)
        mask = mask.reshape(self.shape)
        repeats = prod(n for n, step in zip(mask.shape, mask.stride()) if step == 0)
        stays_a_view = repeats >= LARGE and mask.stride(-1) == 0
        return mask if stays_a_view else mask.contiguous()

    def _repeated(self, keep):
        "Return the decisions as rows (groups, size): a view of stride 0, or a copy where numpy's is faster."
        if self.size < LARGE and keep.device.type == 'cpu':
            return torch.from_numpy(np.repeat(keep.numpy(), self.size))
        return keep[:, None].expand(-1, self.size)

    def _unpermuted(self, mask):
        "Undo the permutation that `rows` makes."
        permuted = [self.dims[i] for i in self.order]
        inverse = [self.order.index(i) for i in range(len(self.order))]
        return mask.reshape(permuted).permute(inverse)

    def _cropped(self, mask):
        "Undo the padding that `rows` makes."
        padded = mask.reshape([groups * entries for groups, entries in self.view])
        return padded[tuple(slice(length) for length in self.axes.values())]


class TiedGrouping(Grouping):
    """Split a weight into groups of filters that are pruned together with those of other layers.

    A group may have several filters of the weight, or none."""

    def __init__(self,
        filters: Grouping,  # the weight's, of which each group is a filter
        of_filters: np.ndarray,  # ints (filters,), the group of each
        groups: int,  # how many groups there are, with those that have no filter of this weight
        parts: list,  # of ints (n,), rising: the groups that compete with each other
    ):
        self.filters, self.of_filters = filters, torch.as_tensor(of_filters)
        self.shape, self.axes, self.groups = filters.shape, filters.axes, groups
        counts = torch.bincount(self.of_filters, minlength=groups)
        most, self.pad = int(counts.max()), bool((counts != counts[0]).any())
        self.size = most * filters.size
        self.sizes = counts * filters.size if self.pad else self.size
        self.one_layer, self.whole_filters, self.in_order = False, True, False
        self.parts = [torch.as_tensor(part) for part in parts] if len(parts) > 1 else []
        order = torch.argsort(self.of_filters, stable=True)
        nth = torch.arange(len(order)) - (counts.cumsum(0) - counts)[self.of_filters[order]]
        self.places = torch.full((groups, most), filters.groups)  # the filters of each group; behind the last where there are fewer
        self.places[self.of_filters[order], nth] = order

    def rows(self, tensor):
        rows = self.filters.rows(tensor).reshape(self.filters.groups, -1)
        if self.pad: rows = torch.cat([rows, torch.zeros_like(rows[:1])])
        shape = (self.groups, self.size) if self.size > 1 else (self.groups,)
        return rows[self.places.to(rows.device)].reshape(shape)

    def mean(self, scores, where=slice(None)):
        if not self.pad: return super().mean(scores, where)
        scores = torch.as_tensor(scores)
        scores = scores.reshape(len(scores), -1)
        return scores.sum(1) / self.sizes.to(scores.device)[where].clamp(min=1)

    def numbers(self, at): return self.of_filters.to(at.device)[self.filters.numbers(at)]
    def expand(self, keep): return self.filters.expand(keep[self.of_filters.to(keep.device)])
