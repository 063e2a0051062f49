"Say how far a network is from its teacher: knowledge distillation."
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import inf
from numbers import Real

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fasterai.arguments import callable_with
from fasterai.kinds import widened

WAY = 'distillation(loss=...), a function of both'


@dataclass(frozen=True, repr=False)
class distillation:
    """Train a network that is pruned by the outputs of the dense one too (Hinton et al. 2015).

    The dense network is the one before the first event: it stays in memory until the end of the fit. In a
    batch in which its own loss is the lower one, a share of the loss is replaced by the distance between the
    outputs. `ValueError` or `TypeError` where an argument is none."""
    share: float = .9  # of the loss, more than 0 and up to 1; the labels have the rest
    temperature: float = 2.  # by which the outputs of a classifier are divided: above 1 the unlikely classes count more
    loss: Callable | None = None  # distance of both outputs as the network returns them, a scalar; None: of classes the cross-entropy beyond its least, else the mean of the squares

    def __post_init__(self):
        _check('share', self.share, 1, 'a share of the loss, above 0 and up to 1')
        _check('temperature', self.temperature, inf, 'a number above 0')
        if self.loss is not None: callable_with('distil', self.loss, 2, 'a function of both outputs as loss=')

    def __repr__(self):
        given = [(one.name, getattr(self, one.name)) for one in fields(self)]
        shown = [f'{name}={value!r}' for name, value in given if value != getattr(type(self), name)]
        return f'{type(self).__name__}({", ".join(shown)})'

    def distance(self,
        output,  # of the network, as it returns it
        taught,  # that of the teacher
        targets: tuple,  # of the batch
        loss_func: Callable,  # of output and targets
    ) -> torch.Tensor:  # a scalar
        "Return how far two outputs are from each other."
        if self.loss is not None: return self.loss(output, taught)
        pairs = _pairs(output, taught)
        if len(pairs) != len(targets): targets = [None] * len(pairs)
        return sum(self._distance(one, other, target, loss_func)
                   for (one, other), target in zip(pairs, targets))

    def _distance(self, output, taught, target, loss_func):
        output, taught = widened(output), widened(taught)
        axis = class_axis(output, target, loss_func)
        if axis is None: return F.mse_loss(output, taught)
        by_both = [F.log_softmax(one / self.temperature, axis) for one in (output, taught)]
        distance = F.kl_div(*by_both, reduction='none', log_target=True).sum(axis).flatten()
        return distance[_counts(target, loss_func)].mean() * self.temperature ** 2  # so that its gradient keeps its size


def _check(name, value, most, expected):
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and 0 < value <= most: return
    raise ValueError(f'distil: got {name}={value!r}, expected {expected}')


def read_distil(
    distil,  # as the user gave it: None or 0, a share of the loss, or `distillation(...)`
) -> distillation | None:
    "Read a distillation; `TypeError` or `ValueError` where it cannot be one."
    if distil is None or isinstance(distil, distillation): return distil
    if isinstance(distil, bool) or not isinstance(distil, Real):
        raise TypeError(f'distil: got {distil!r}, expected a share of the loss, 0 to 1, or distillation(...)')
    return distillation(distil) if distil else None


def class_axis(
    output: torch.Tensor,
    target,  # of the batch
    loss_func: Callable,  # fastai's say which axis has the classes
) -> int | None:
    "Return the axis of the classes; None where the targets are not classes, one for each position."
    if not isinstance(target, torch.Tensor) or target.is_floating_point() or not output.ndim: return None
    for axis in dict.fromkeys((getattr(loss_func, 'axis', 1), -1)):
        if not -output.ndim <= axis < output.ndim: continue
        n = output.shape[axis]
        if n > 1 and n * target.numel() == output.numel(): return axis
    return None


def _counts(target, loss_func):
    "Tell which positions count: a loss may leave out a class, such as that of padded tokens."
    inner = getattr(loss_func, 'func', loss_func)
    return target.flatten() != getattr(inner, 'ignore_index', -100)


def _pairs(output, taught):
    "Return the outputs of both, side by side; `ValueError` where they do not match."
    pairs = list(zip(_floats(output), _floats(taught)))
    if pairs and all(one.shape == other.shape for one, other in pairs): return pairs
    shapes = ' and '.join(str([tuple(leaf.shape) for leaf in _floats(found)]) for found in (output, taught))
    raise ValueError(f'distil: got outputs of shapes {shapes}, expected those of the network '
                     f'like those of the dense one, or {WAY}')


def _floats(outputs):
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def as_seen(
    output,  # what is left of an output in the loop
    taught,  # the output of the teacher as it returns it
):
    "Return a teacher's output as a loss takes it: a recurrent network of fastai returns more than that."
    if not isinstance(output, torch.Tensor) or isinstance(taught, torch.Tensor): return taught
    found = _floats(taught)
    return found[0] if found else taught


def as_teacher(
    model: nn.Module,  # is changed
) -> nn.Module:
    "Make a copy of a network a teacher: in eval mode, without gradients."
    for module in model.modules(): module.training = False  # eval() is overloaded in some models
    return model.requires_grad_(False)
