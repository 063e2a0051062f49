"What lives and dies together: sets of named axes of a layer's weight."
import re
from math import prod

import torch
from torch import nn

from fasterai.arguments import nearest

# The axes of a layer type's weight: O output, I input, k… kernel. G is the groups of a grouped convolution,
# which PyTorch folds into the first axis: (G O) is one axis of G × O entries.
AXES = {
    nn.Linear: 'O I',
    nn.Conv1d: '(G O) I k',
    nn.Conv2d: '(G O) I kh kw',
    nn.Conv3d: '(G O) I kd kh kw',
    nn.ConvTranspose1d: '(G I) O k',
    nn.ConvTranspose2d: '(G I) O kh kw',
    nn.ConvTranspose3d: '(G I) O kd kh kw',
}


def _kernel(axes): return tuple(a for a in axes if a.startswith('k'))
def _filter(axes): return tuple(a for a in axes if a not in 'GO')


# A granularity picks, from the axes of a layer, those that one group spans.
GRANULARITIES = {
    'weight': lambda axes: (),
    'vector': lambda axes: _kernel(axes)[-1:],
    'kernel': _kernel,
    'filter': _filter,
}


def axes_of(
    module: nn.Module,
) -> str | None:  # the row of `AXES` for its type or the nearest base class, None if there is none
    "The axes of a layer's weight."
    return next((AXES[c] for c in type(module).__mro__ if c in AXES), None)


class Grouping:
    "How the weight of one layer falls into groups."

    def __init__(self,
        module: nn.Module,  # a layer of a type in `AXES`
        granularity: str | tuple = 'weight',  # a name in `GRANULARITIES`, or the axes that a group spans, as ('I', 'kh')
        name: str = '',  # the layer's name, for errors
    ):
        row = axes_of(module)
        axes = tuple(re.findall(r'\w+', row))
        spanned = _spanned(granularity, axes, f'{type(module).__name__} {name!r}')
        self.folds = module.groups if row.startswith('(') else None
        self.shape = tuple(module.weight.shape)
        self.view = self.split(module.weight).shape  # one entry an axis
        self.dims = tuple(i for i, a in enumerate(axes) if a in spanned)
        self.grid = tuple(1 if i in self.dims else s for i, s in enumerate(self.view))  # the groups, broadcastable to view
        self.groups = prod(self.grid)
        self.size = prod(self.shape) // max(self.groups, 1)  # weights a group
        self.whole_filters = set(spanned) == set(_filter(axes))  # a group is all that makes one output channel

    def split(self, tensor: torch.Tensor) -> torch.Tensor:
        "The view of a tensor of the weight's shape that has one dimension for each axis."
        return tensor if self.folds is None else tensor.unflatten(0, (self.folds, -1))

    def mean(self,
        scores: torch.Tensor,  # of the weight's shape
    ) -> torch.Tensor:  # (groups,)
        "The score of a group: the mean of its entries' scores, so that groups of different size compare."
        return (self.split(scores).mean(self.dims) if self.dims else scores).flatten()

    def count(self,
        mask: torch.Tensor,  # bool, of the weight's shape
    ) -> torch.Tensor:  # (groups,), int64
        "How many entries of each group are True."
        return (self.split(mask).sum(self.dims) if self.dims else mask.long()).flatten()

    def expand(self,
        keep: torch.Tensor,  # (groups,), bool
    ) -> torch.Tensor:  # bool, of the weight's shape
        "A decision for each group, written to each weight."
        return keep.view(self.grid).expand(self.view).reshape(self.shape)


def _spanned(granularity, axes, whose):
    "The axes that a group spans in a layer with these `axes`; `ValueError` if the layer cannot have that."
    allowed = f'allowed for {whose} is one of {", ".join(GRANULARITIES)}, or a tuple of its axes {", ".join(axes)}'
    if isinstance(granularity, str):
        if granularity in GRANULARITIES: return GRANULARITIES[granularity](axes)
        raise ValueError(f'granularity: got {granularity!r}, {allowed}{nearest(granularity, GRANULARITIES)}')
    if not isinstance(granularity, (tuple, list)):
        raise TypeError(f'granularity: got {granularity!r}, {allowed}')
    for axis in granularity:
        if axis not in axes: raise ValueError(f'granularity: got axis {axis!r}, {allowed}{nearest(axis, axes)}')
    return tuple(granularity)
