"What lives and dies together: sets of named axes of a layer's weight."
import re
from math import prod

import numpy as np
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
        self.shape = tuple(module.weight.shape)
        self.view = (module.groups, self.shape[0] // module.groups, *self.shape[1:]) if row.startswith('(') else self.shape  # one entry an axis
        across = [i for i, a in enumerate(axes) if a not in spanned]
        self.order = (*across, *(i for i, a in enumerate(axes) if a in spanned))  # what tells groups apart, then what they span
        self.groups = prod(self.view[i] for i in across)
        self.size = prod(self.shape) // max(self.groups, 1)  # weights a group
        self.whole_filters = set(spanned) == set(_filter(axes))  # a group is all that makes one output channel

    def rows(self,
        tensor: torch.Tensor,  # of the weight's shape
    ) -> torch.Tensor:  # (groups, size), or (groups,) where a group is one weight; a view where the layout allows
        "One row for each group, in the order of their position."
        tensor = tensor.reshape(self.view).permute(self.order)
        return tensor.reshape(-1) if self.size == 1 else tensor.reshape(self.groups, self.size)

    def mean(self,
        scores: torch.Tensor | np.ndarray,  # rows
    ) -> torch.Tensor | np.ndarray:  # (rows,), as they came
        "The score of a group: the mean of its entries' scores, so that groups of different size compare."
        if self.size == 1: return scores
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
    ) -> torch.Tensor:  # bool, of the weight's shape, contiguous
        "A decision for each group, written to each weight."
        if self.order == tuple(sorted(self.order)):
            if self.size > 1: keep = torch.from_numpy(np.repeat(keep.numpy(), self.size)) if keep.device.type == 'cpu' else keep.repeat_interleave(self.size)
            return keep.view(self.shape)
        wide = keep.view(-1, 1).expand(self.groups, self.size).view([self.view[i] for i in self.order])
        return wide.permute([self.order.index(i) for i in range(len(self.order))]).reshape(self.shape).contiguous()


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
