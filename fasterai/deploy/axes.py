"Describe a tensor by the labels of its axes, and by the entries that are zero for every input."
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import numpy as np

from fasterai.deploy.labels import FIXED, Labels

MOST = 2 ** 23  # entries of an array that says what is zero; above it less is said


@dataclass(frozen=True, eq=False)
class Axes:
    "Describe one tensor."
    shape: tuple
    rows: tuple  # for each axis its labels, int (length, k)
    zero: np.ndarray  # bool, of as many axes, each of the tensor's length or 1: True where all entries are zero
    constant: bool = False  # it does not depend on the network's input
    initial: bool = False  # a parameter that is all zero, as a head or scale before training: it counts as alive

    def over(self,
        axis: int,
    ) -> np.ndarray:  # bool (length,)
        "Return the positions of an axis at which all is zero."
        others = tuple(i for i in range(len(self.shape)) if i != axis % len(self.shape))
        return np.broadcast_to(self.zero.all(others), self.shape[axis])

    @property
    def as_factor(self) -> np.ndarray:
        "Return what is zero, where a product shall be zero for it."
        return np.zeros((1,) * len(self.shape), bool) if self.initial else self.zero

    def with_rows(self, axis, rows):
        "Return a tensor with other labels on an axis."
        new = list(self.rows)
        new[axis] = rows
        return replace(self, rows=tuple(new))


def fixed(
    length: int,
) -> np.ndarray:  # (length, 1)
    "Return the labels of an axis of which nothing can go."
    return np.full((length, 1), FIXED)


def plain(
    shape: tuple,
    constant: bool = False,
) -> Axes:
    "Return a tensor of which nothing is known."
    return Axes(tuple(shape), tuple(map(fixed, shape)), nothing(len(shape)), constant)


def nothing(ndim):
    "Return that nothing is zero."
    return np.zeros((1,) * ndim, bool)


def narrow_down(
    zero: np.ndarray,
    most: int = MOST,  # entries of the result
) -> np.ndarray:
    "Return what is zero with as few entries as say it: axes along which all is alike have length 1."
    if zero.all(): return np.ones((1,) * zero.ndim, bool)
    if not zero.any(): return nothing(zero.ndim)
    if zero.size <= most: return zero
    for axis in range(zero.ndim): zero = zero.all(axis, keepdims=True) if zero.size > most else zero
    return zero


# Reshaping

def blocks(
    before: tuple,  # shape
    after: tuple,
) -> list | None:  # of (axes before, axes after)
    "Find the smallest groups of axes of two shapes that have as many entries; None where one is empty."
    if 0 in before or 0 in after: return None
    found, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        ins, outs = [], []
        while True:
            m, n = prod(before[a] for a in ins), prod(after[a] for a in outs)
            if ins and outs and m == n: break
            if not ins and not outs:
                if i < len(before): ins, i = [i], i + 1
                if j < len(after): outs, j = [j], j + 1
                if not ins or not outs: break
            elif m <= n and i < len(before): ins, i = [*ins, i], i + 1
            elif j < len(after): outs, j = [*outs, j], j + 1
            elif i < len(before): ins, i = [*ins, i], i + 1
            else: break
        found.append((ins, outs))
    return found


def reshaped(
    x: Axes,
    shape: tuple,
    labels: Labels,
) -> Axes:
    "Return a tensor in another shape: axes are merged and split."
    shape = tuple(shape)
    if shape == x.shape: return x
    found = blocks(x.shape, shape)
    if found is None: return plain(shape, x.constant)
    rows = [None] * len(shape)
    for ins, outs in found:
        real = [a for a in outs if shape[a] != 1]
        for a in outs: rows[a] = fixed(shape[a])
        if not real: continue
        ins = [a for a in ins if x.shape[a] != 1]
        new = _redivided([x.rows[a] for a in ins], [shape[a] for a in real], labels)
        for a, some in zip(real, new): rows[a] = some
    return Axes(shape, tuple(rows), _reshaped_zero(x, shape, found), x.constant, x.initial)


def _redivided(parts, lengths, labels):
    "Return the rows of the axes that others become, through the factors that both are made of."
    before = [len(p) for p in parts]
    bounds = sorted({*_bounds(before), *_bounds(lengths)})
    if any(b % a for a, b in pairwise(bounds)): return split(merged(parts), lengths, labels)
    factors = [b // a for a, b in pairwise(bounds)][::-1]
    divided = [some for p, f in zip(parts, _shared_out(factors, before)) for some in split(p, f, labels)]
    found, at = [], 0
    for f in _shared_out(factors, lengths):
        found.append(merged(divided[at:at + len(f)]))
        at += len(f)
    return found


def _bounds(lengths):
    "Return the products of the last lengths: of none, of one, and so on."
    return [prod(lengths[i:]) for i in range(len(lengths) + 1)]


def _shared_out(factors, lengths):
    "Return the factors of each length."
    found, left = [], list(factors)
    for n in lengths:
        found.append([])
        while prod(found[-1]) < n: found[-1].append(left.pop(0))
    return found


def _reshaped_zero(x, shape, found):
    "Return what is zero in another shape: axes that matter are merged and split, the others have length 1."
    full, new = [], []
    for ins, outs in found:
        matters = any(x.zero.shape[a] != 1 for a in ins)
        full += [x.shape[a] if matters else 1 for a in ins]
        new += [shape[a] if matters else 1 for a in outs]
    if prod(full) > max(MOST, x.zero.size): return nothing(len(shape))
    return np.broadcast_to(x.zero, full).reshape(new)


def merged(
    parts: list,  # rows of each axis
) -> np.ndarray:  # (product of the lengths, labels)
    "Return the rows of the axis that several become."
    if len(parts) == 1: return parts[0]
    if not parts: return fixed(1)
    lengths, columns = [len(p) for p in parts], []
    for i, part in enumerate(parts):
        for column in part.T:
            if not column.any(): continue
            at = [1] * len(parts)
            at[i] = lengths[i]
            columns.append(np.broadcast_to(column.reshape(at), lengths).ravel())
    return np.stack(columns, 1) if columns else fixed(prod(lengths))


def split(
    flat: np.ndarray,  # rows (positions, labels)
    lengths: list,  # of the axes that the axis becomes
    labels: Labels,
) -> list:  # rows of each
    "Return the rows of the axes that one becomes: a label goes to the one it belongs to, or gets new ones."
    if len(lengths) == 1: return [flat]
    columns = [[] for _ in lengths]
    for column in flat.T:
        if not column.any(): continue
        grid = column.reshape(lengths)
        along = [a for a in range(len(lengths)) if (grid != grid.take([0], a)).any()]
        if not along: along = [0]
        if len(along) == 1:
            index = [0] * len(lengths)
            index[along[0]] = slice(None)
            columns[along[0]].append(grid[tuple(index)])
            continue
        new = [labels.new(lengths[a]) for a in along]
        for a, some in zip(along, new): columns[a].append(some[:, 0])
        spread = [new[along.index(a)] if a in along else fixed(n) for a, n in enumerate(lengths)]
        labels.bind(column[:, None], merged(spread))
    return [np.stack(some, 1) if some else fixed(n) for some, n in zip(columns, lengths)]
