"Describe a call of one of torch's operations, and follow those that work entry by entry."
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map

from fasterai.deploy.axes import Axes, fixed, narrow_down, nothing
from fasterai.deploy.labels import Labels
from fasterai.deploy.why import IS_SHIFTED, MEETS_NONZERO, makes_nonzero, mixes


@dataclass(frozen=True, eq=False)
class Call:
    "Describe one call of an operation."
    func: object  # of torch.ops
    name: str  # without a last underscore
    given: dict  # its arguments by name
    axes_of: Callable  # returns the `Axes` of a tensor
    labels: Labels
    resize: Callable  # (number in the code, rows that it counts): notes it
    shape: tuple = ()  # of the first result

    def __getitem__(self, key): return self.given[key]

    def get(self, key, default=None):
        "Return an argument, or a default where there is none of this name."
        return self.given.get(key, default)

    def axes(self, key) -> Axes | None:
        "Return the axes of the tensor that an argument is, None if it is none."
        value = self.get(key)
        return self.axes_of(value) if isinstance(value, torch.Tensor) else None

    @cached_property
    def first(self) -> Axes:
        "Return the axes of the first tensor among the arguments."
        return self.inputs[0]

    @cached_property
    def inputs(self) -> list:
        "Return the axes of all tensors among the arguments."
        return [self.axes_of(t) for t in tree_leaves(self.given) if isinstance(t, torch.Tensor)]


def other(call):
    "Know nothing of the result: whatever goes in must stay, and what meets the result."
    reason = mixes(call.name)
    for x in call.inputs:
        for rows in x.rows: call.labels.block(rows, reason)
    rows = tuple(map(call.labels.new, call.shape))
    for some in rows: call.labels.block(some, reason)
    return Axes(call.shape, rows, nothing(len(call.shape)))


# Entry by entry

def pointwise(call):
    "Bind the positions that meet; zero is what the operation makes of zeros."
    return together(call, call.inputs, call.shape, _zero_of_all(call))


def multiplication(call):
    "Bind the positions that meet; zero is what has a factor that is zero."
    zeros = [x.as_factor for x in call.inputs]
    if len(zeros) == 1 and not isinstance(call.get('other'), torch.Tensor): zeros = [call.first.zero]
    return together(call, call.inputs, call.shape, any_zero(zeros, call.shape))


def first_decides(call):
    "Bind the positions that meet; zero is where the first input is, as of a quotient or a PReLU."
    return together(call, call.inputs, call.shape, aligned(call.first.zero, len(call.shape)))


def addcmul(call):
    "Bind the positions that meet; zero is a sum of zero and a product that is zero."
    product = any_zero([call.axes('tensor1').as_factor, call.axes('tensor2').as_factor], call.shape)
    zero = aligned(call.axes('self').zero, len(call.shape)) & product
    return together(call, call.inputs, call.shape, zero)


def where(call):
    "Bind the positions that meet; zero is where both choices are."
    zero = all_zero([call.axes('self').zero, call.axes('other').zero], call.shape)
    return together(call, call.inputs, call.shape, zero)


def copy(call):
    "Copy one tensor into another."
    zero = aligned(call.axes('src').zero, len(call.shape))
    return together(call, call.inputs, call.shape, zero)


def masked(call):
    "Follow a tensor some of whose entries become one number."
    value = call['value']
    keeps = value == 0 if not isinstance(value, torch.Tensor) else bool((value == 0).all())
    zero = aligned(call.first.zero, len(call.shape)) & keeps
    return together(call, call.inputs[:2], call.shape, zero)


def fill(call):
    "Fill a tensor with one number."
    zero = np.full((1,) * len(call.shape), call.name == 'zero' or call.get('value') == 0)
    return replace(call.first, zero=zero)


def drawn(call):
    "Fill a tensor with random numbers."
    return replace(call.first, zero=nothing(len(call.shape)), constant=False)


def made(call):
    "Make a tensor of numbers that depend on no input: any of it may go with what it meets."
    rows = tuple(call.labels.new(n) for n in call.shape)
    for n, some in zip(call.shape, rows): call.resize(n, some)
    is_zero = call.name in ('zeros', 'zeros_like', 'new_zeros') or call.get('fill_value') == 0
    # not a constant: what it is at one length says nothing of others, as the positions of tokens
    return Axes(call.shape, rows, np.full((1,) * len(call.shape), is_zero))


def together(call, inputs, shape, zero):
    "Return a result whose positions are those of the inputs that meet at them."
    rows = []
    for axis, n in enumerate(shape):
        behind = len(shape) - axis  # counted from the end, as axes are broadcast
        there = [x for x in inputs if len(x.shape) >= behind]
        met = [x.rows[-behind] for x in there if x.shape[-behind] == n]
        here = met[0] if met else fixed(n)
        for some in met[1:]: here = call.labels.bind(here, some) if n > 1 else here
        rows.append(here)
    initial = len(inputs) == 1 and inputs[0].initial
    known = Axes(tuple(shape), tuple(rows), narrow_down(zero), all(x.constant for x in inputs), initial)
    _note_losses(call, inputs, known)
    return known


def _note_losses(call, inputs, known):
    "Note the positions that were zero in some input, and are zero no more."
    for x in inputs:
        if x.constant or not x.zero.any(): continue
        reason = MEETS_NONZERO if len(inputs) > 1 else makes_nonzero(call.name)
        if len(inputs) > 1 and any(y.constant for y in inputs): reason = IS_SHIFTED
        for axis in range(len(x.shape)):
            at = axis - len(x.shape) + len(known.shape)
            if x.shape[axis] != known.shape[at] or not x.rows[axis].any(): continue
            call.labels.lose(x.rows[axis], x.over(axis) & ~known.over(at), reason)


def aligned(zero, ndim): return zero.reshape((1,) * (ndim - zero.ndim) + zero.shape)
def any_zero(zeros, shape): return _combined(np.logical_or, zeros, shape)
def all_zero(zeros, shape): return _combined(np.logical_and, zeros, shape)


def _combined(operation, zeros, shape):
    found, *others = [aligned(narrow_down(z), len(shape)) for z in zeros]
    for z in others:
        size = prod(max(pair) for pair in zip(found.shape, z.shape))
        if size > 2 ** 24: found = found if found.any() and not z.any() else z
        else: found = operation(found, z)
    return found


def _zero_of_all(call):
    "Return where all inputs are zero, if the operation makes zero of that."
    if not call.inputs or not _all_zero_possible(call): return nothing(len(call.shape))
    def none(x): return torch.zeros((), dtype=x.dtype) if isinstance(x, torch.Tensor) else x
    given = tree_map(none, dict(call.given))
    if 'device' in given: given['device'] = None
    try: value = call.func(**given)
    except Exception: return nothing(len(call.shape))
    if bool((value != 0).any()): return nothing(len(call.shape))
    return all_zero([x.zero for x in call.inputs], call.shape)


def _all_zero_possible(call): return all(x.zero.any() for x in call.inputs)


